"""The list of traps, and which tests set each. Every trap has a test, and every test of this folder is in the list.

One trap is none on a CPU: addresses past 2**31 elements overflow only in kernels that compute addresses themselves.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

#: What has gone wrong in this project or another, and the tests that set it: ``file: test, test``, without ``test_``.
#: A file outside this folder is given by its path.
TRAPS: dict[str, tuple[str, ...]] = {
    # --- rows and fills ---
    "a fully masked row: NaN for -inf, the mean of every value for a finite fill, zero in SDPA": (
        "masks: a_fully_masked_row_keeps_its_meaning, a_fully_masked_row_of_an_additive_mask_keeps_its_meaning",
        "masks: weights_cleared_after_the_softmax_make_empty_rows_zero, nan_weights_cleared_make_empty_rows_zero",
        "tests/kernels/test_forward.py: behind_minus_infinity_they_are_nan",
        "tests/kernels/test_forward.py: behind_a_finite_fill_they_are_the_mean_of_every_value",
        "tests/kernels/test_forward.py: with_a_sink_they_are_zero",
    ),
    "left padding empties rows under a causal mask": (
        "masks: left_padding_under_a_causal_mask_empties_rows, two_finite_masks_on_one_key_overflow",
        "tests/kernels/test_forward.py: left_padding_makes_them_even_where_a_causal_mask_does_not",
    ),
    "a mask of the other sign": ("masks: a_mask_subtracted_is_infinite",),
    "one number is a mask": ("masks: one_number_added_to_every_score",),
    "where replaces, + adds": ("masks: where_replaces_and_plus_adds",),
    "a fill of 0 or -1 is no mask": (
        "masks: a_fill_that_masks_nothing_is_a_value, a_choice_that_masks_nothing_is_a_value",
        "masks: a_fill_that_is_a_tensor",
    ),
    "float32's least number cast to a half type is -inf": ("masks: the_least_float32_is_infinite_in_half_types",),
    "a type that does not have a number": (
        "masks: positions_that_a_half_type_does_not_have, bytes_that_change_their_sign",
    ),
    # --- which keys are kept ---
    "the polarity of a mask": ("masks: polarity_is_read_not_guessed",),
    "a mask of other values than 0 and 1": (
        "masks: a_mask_may_hold_more_than_zeros_and_ones, one_minus_a_mask_of_floats_is_arithmetic",
        "masks: ids_of_unsigned_bytes_wrap_around, whole_numbers_compared_as_floats",
    ),
    "a bool is added to scores": ("masks: a_bool_added_to_scores_adds_one",),
    "add(..., alpha=2)": ("masks: alpha_multiplies_what_is_added, alpha_of_sub_multiplies_what_is_subtracted",),
    "masks of one to five dimensions": ("masks: masks_broadcast_from_any_rank, a_mask_may_add_a_dimension",),
    "a mask that enlarges the batch": ("masks: a_mask_may_enlarge_the_batch",),
    "causality is proven, from constants and index arithmetic, never from a name": (
        "masks: causality_is_not_proven_by_a_name, a_mask_of_columns_is_not_one_of_rows",
        "masks: a_window_of_distances_has_two_sides",
        "tests/kernels/test_rows.py: what_data_decides_is_not_proven, rows_kept_is_what_the_mask_says",
    ),
    "causal alignment, top left and bottom right, where rows and keys differ in number": (
        "masks: a_causal_mask_is_aligned_as_it_is_written",
    ),
    # --- axes ---
    "a softmax over another axis than the last": (
        "axes: a_softmax_over_another_axis_is_no_attention, a_softmax_over_rows_of_turned_scores_is_attention",
        "axes: weights_turned_after_the_softmax_are_no_attention, weights_normalised_again_over_rows",
        "axes: a_maximum_over_rows_is_no_shift, a_shift_by_the_whole_maximum, softmax_twice",
    ),
    "every permute, view and slice is checked against real sizes": (
        "axes: a_key_that_is_not_turned, heads_and_rows_mixed_up, heads_swapped_between_scores_and_values",
        "axes: weights_of_some_keys_do_not_sum_to_one, scores_of_some_keys, values_shifted_against_their_weights",
        "axes: values_flipped, rolled_scores",
    ),
    "sums over what should be kept": (
        "axes: scores_summed_over_the_batch, scores_summed_over_heads, values_summed_over_heads, a_diagonal_product",
        "axes: a_relative_position_depends_on_the_query",
    ),
    "repeat_interleave and repeat share heads in different orders": (
        "axes: repeat_interleave_shares_a_key_among_neighbours, repeat_shares_a_key_among_every_other_head",
        "axes: keys_in_one_head_order_and_values_in_another, keys_of_fewer_heads_than_values",
    ),
    "keys and values that broadcast": (
        "axes: broadcast_keys_and_values, values_of_a_larger_batch",
        "tests/kernels/test_forward.py: a_broadcast_batch_of_keys",
    ),
    "one row, one key, no elements, values wider or narrower than keys": (
        "axes: odd_sizes, a_single_key, empty_sizes",
        "tests/kernels/test_forward.py: sizes_of_zero",
    ),
    # --- scale ---
    "a scale that is a tensor, learned, symbolic, zero or negative": (
        "scale: any_number, a_tensor_along_any_axes, a_tensor_on_the_query, of_a_size_that_is_not_known, learned",
        "scale: a_learned_scale_keeps_its_gradient, negative_after_an_infinite_mask",
        "scale: zero_after_an_infinite_mask_is_nan, a_scale_made_of_a_size_that_varies_is_no_bug_of_ours",
    ),
    "a scale split over query and key, or after the mask": (
        "scale: split_over_query_and_key, after_the_mask, of_the_bias_too",
    ),
    "rows that are rescaled after the product": (
        "scale: rows_that_are_rescaled_keep_their_factor, a_gate_of_the_sum_and_a_sink_is_a_sink",
        "scale: a_gate_of_something_else_is_no_sink",
    ),
    "a scale after an overflow of half precision": ("scale: after_an_overflow_of_half_precision",),
    "the weights themselves are scaled or gated": ("scale: of_the_weights, of_the_weights_by_a_gate, squared_weights",),
    # --- who else looks, who else writes ---
    "weights or scores that are returned or reused": (
        "hazards: weights_returned, weights_used_twice, weights_averaged_over_heads, scores_returned",
        "hazards: weights_applied_to_their_own_result, the_logarithm_of_weights",
        "closed: unused_weights_are_no_obstacle, returned_weights_are_given",
        "weights: fused_up_to_the_weights, grouped_heads, masks_of_every_kind, sizes_that_are_not_known",
        "weights: two_that_share_their_scores, gradients_through_weights_and_product, dropout_stays_where_it_is",
        "weights: refused, no_node_of_aten_alone_gives_weights, the_gate_says_what_would_be_faster",
        "weights: kernels_are_asked_about_weights",
    ),
    "weights with a hook, or used by the backward": (
        "hazards: weights_with_a_hook, a_weight_that_the_backward_needs",
        "closed: gradients_reach_the_parameters",
    ),
    "views of key or value returned as a cache": ("hazards: views_of_keys_and_values_returned_as_a_cache",),
    "mutation between the products": (
        "hazards: an_operand_is_changed, a_view_of_the_key_is_changed, a_mask_is_changed_after_it_was_read",
        "hazards: scores_are_changed_in_place, scores_are_changed_through_a_view",
        "hazards: what_is_written_through_a_view, what_is_written_through_another_input",
        "hazards: a_broadcast_product_that_is_written_before_it_is_summed",
        "hazards: scores_are_changed_through_a_flat_view, scores_are_changed_after_the_softmax",
        "hazards: weights_are_changed_after_the_product, weights_are_changed_before_the_product",
        "hazards: the_result_is_changed, the_query_is_overwritten_with_the_result, a_cache_is_filled_between",
    ),
    "a later view relies on the result's strides": (
        "hazards: a_view_that_depends_on_strides, a_view_of_turned_values",
    ),
    "attention beside attention, and softmaxes that are none": (
        "hazards: two_attentions_in_a_row, two_attentions_share_keys_and_values, attention_of_a_tensor_to_itself",
        "hazards: attention_of_repeated_heads_to_themselves, a_router",
    ),
    "sinks on the wrong side, with a value, or one to a row": (
        "hazards: a_sink_may_be_cut_off_on_the_wrong_side, a_sink_that_is_given_a_value, a_sink_that_differs_by_row",
    ),
    "dropout is random": ("hazards: dropout_keeps_its_distribution",),
    "regions whose bodies are graphs of their own": (
        "closed: a_checkpointed_region_hides_neither_itself_nor_its_surroundings",
        "closed: explaining_leaves_the_graph_that_runs",
    ),
    "TF32 is the user's": ("hazards: the_precision_of_products_stays_the_user_s",),
    # --- kernels ---
    "padding inside a kernel is -inf, never zero": (
        "tests/kernels/test_forward.py: as_exact_as_the_written_out_program, a_masked_key_of_nan_contributes_nothing",
    ),
    "blocks of keys of which a row keeps none are merged without NaN": (
        "tests/kernels/test_rows.py: reach_holds_every_kept_key_and_core_only_kept_ones",
        "tests/kernels/test_forward.py: as_exact_as_the_written_out_program",
    ),
    "a row of which every score is NaN": ("tests/kernels/test_forward.py: rows_of_which_every_score_is_nan_are_nan",),
    # --- what is attention already, and what has no softmax ---
    "what scaled_dot_product_attention says of masks, empty rows, heads and scales": (
        "calls: is_causal_is_aligned_top_left, an_empty_row_is_zero_behind_a_bool_mask, any_rank, any_scale",
        "calls: an_empty_row_is_zero_behind_a_mask_of_minus_infinity, a_single_key, bfloat16_scores_stay_exact",
        "calls: an_empty_row_behind_a_finite_fill_weighs_every_key, masks_are_recovered_as_predicates",
        "calls: grouped_heads_share_runs_of_query_heads, an_operand_is_changed_after_the_call",
        "calls: a_call_is_replaced_by_what_is_faster, the_call_that_gives_the_sums_besides",
    ),
    "what flex_attention says, and block masks that say another thing than their mask": (
        "flex: a_program_on_scores_is_read, a_captured_bias_and_a_block_mask_of_the_graph_are_read",
        "flex: rows_that_keep_no_key_are_zero, a_block_mask_that_is_an_argument_is_not_believed",
        "flex: a_block_mask_of_another_mask_is_seen, a_mask_that_is_other_for_each_head_than_its_blocks_is_seen",
        "flex: the_logarithm_of_sums_is_still_wanted, a_compiled_call_is_left_to_flex",
        "flex: one_tensor_may_be_query_key_and_value",
    ),
    "a mask in a buffer is a predicate only where no value of it can change": (
        "constants: what_cannot_change_is_a_predicate, one_wrong_value_is_no_predicate",
        "constants: a_buffer_that_a_checkpoint_may_replace_stays_a_tensor, a_buffer_that_is_written_stays_a_tensor",
        "constants: an_attribute_under_torch_compile_stays_a_tensor",
        "constants: a_large_site_is_certified_with_the_mask_it_has",
        "numbered: positions_in_order_are_one_document, what_more_than_numbers_decides_stays_a_tensor",
        "numbered: a_length_that_may_change_is_no_number",
    ),
    "a softmax that makes empty rows zero": ("calls: a_softmax_that_is_safe, a_softmax_whose_empty_rows_are_cleared",),
    "weights that no softmax made": (
        "unnormalised: sigmoid_attention, squared_relu, the_masked_product_of_linear_attention, dropout_of_weights",
        "unnormalised: retention_decays_with_distance, other_activations, shared_heads_and_flat_batches",
        "unnormalised: a_mask_before_a_sigmoid_leaves_no_weight, a_mild_fill_before_a_sigmoid_leaves_a_weight",
        "unnormalised: a_masked_key_of_nan_weighs_nothing, weights_returned",
    ),
    "two products that are no attention": (
        "unnormalised: a_normaliser_that_is_no_softmax_is_refused, operands_without_a_common_axis",
        "unnormalised: products_without_anything_between_are_left_to_associativity",
        "unnormalised: parameters_are_no_keys_and_values",
    ),
    "a form that only a file holds": ("portable: a_file_holds_it",),
    # --- modes ---
    "autocast that a program switches on and off itself": ("autocast: a_site_is_replayed_in_the_modes_that_it_is_in",),
    # --- what models write ---
    "forms of real models": (
        "models: a_mask_made_of_lengths, a_bias_gated_by_a_sum, a_bias_that_is_a_piece_of_a_product",
        "models: the_product_with_rows_of_its_own_is_the_score",
        "models: a_bias_that_was_scaled_in_place, scores_bounded_by_a_constant_tensor",
        "models: scores_filled_from_a_constant_tensor, scores_shifted_in_another_unit",
        "models: a_mask_made_of_constant_tensors_is_a_predicate, a_mask_that_keeps_every_row_is_none",
        "models: scores_times_a_mask_of_floats, large_logits_may_leave_the_source_exact_by_luck",
        "models: a_quotient_of_sizes_is_no_tensor, a_bias_of_products_on_products",
        "models: two_attentions_share_the_sum_of_two_products, shared_scores_that_somebody_else_sees_too",
        "models: shared_scores_of_which_one_attention_is_refused",
        "models: weights_that_are_skewed_are_refused_and_not_overlooked",
    ),
    "a gradient that detach or no_grad cut off is let through": (
        "gradients: a_gradient_that_is_cut_off_stays_so, what_is_cut_off_before_or_around_it_is_fused",
        "gradients: an_exported_program_is_trained_as_its_source, nothing_is_cut_where_nothing_is_differentiated",
    ),
    "a rewrite rule of ours is wrong": (
        "planted: the_certificate_refuses_a_planted_rule",
        "planted: whole_rows_of_a_mask_show_what_nothing_else_does",
        "planted: without_the_planted_rule_it_fuses_or_is_refused_for_what_it_is",
    ),
}

#: What Inductor 2.13 fuses wrongly without a word, or crashes on; these must be fused rightly or refused.
MISCOMPILED_ELSEWHERE: dict[str, str] = {
    "softmax over dimension -2, 1 or 0": "axes: a_softmax_over_another_axis_is_no_attention",
    "add(scores, mask, alpha=2)": "masks: alpha_multiplies_what_is_added",
    "masked_fill with a fill of 0.0": "masks: a_fill_that_masks_nothing_is_a_value",
    "where with a fill of 0.0": "masks: a_choice_that_masks_nothing_is_a_value",
    "a mask that holds 2, tested == 0": "masks: a_mask_may_hold_more_than_zeros_and_ones",
    "a bool added to float16 scores": "masks: a_bool_added_to_scores_adds_one",
    "a mask of one dimension": "masks: masks_broadcast_from_any_rank",
}


def _tests(line: str) -> list[tuple[Path, str]]:
    where, _, names = line.partition(": ")
    file = ROOT / where if "/" in where else FOLDER / f"test_{where}.py"
    return [(file, f"test_{name}") for name in names.split(", ")]


def _defined(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("trap", [*TRAPS, *MISCOMPILED_ELSEWHERE])
def test_a_trap_has_tests(trap: str) -> None:
    lines = TRAPS.get(trap) or (MISCOMPILED_ELSEWHERE[trap],)
    missing = [f"{file.name}: {name}" for line in lines for file, name in _tests(line) if name not in _defined(file)]
    assert not missing


def test_every_test_here_is_in_the_list() -> None:
    listed = {test for lines in TRAPS.values() for line in lines for test in _tests(line)}
    files = [file for file in FOLDER.glob("test_*.py") if file != Path(__file__)]
    assert {(file, name) for file in files for name in _defined(file)} <= listed
