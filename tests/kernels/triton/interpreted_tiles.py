"""Lists of tiles against the mask written out, in Triton's interpreter, which ``test_interpreter`` switches on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnfuse.kernels.gluon.backward_lists import row_tiles_of
from attnfuse.kernels.gluon.backward_meta import BackwardMeta
from attnfuse.kernels.triton import Listing, Mask
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec, Captured

HEIGHT, WIDTH = 24, 16
#: A mask beside its band; what it captures.
MASKS = {
    "documents": ("t0 == t1", ("int64[b0,m]", "int64[b0,n]")),
    "blocks of each head": ("t0", ("bool[h,m,n]",)),
    "padding": ("t0", ("bool[b0,n]",)),
    "nothing": ("t0 & ~t0", ("bool[b0,n]",)),
    "indices": ("m // 20 == n // 20", ()),
}
BANDS = {"open": (None, None), "causal": (None, 3), "window": (-30, 0), "beside the keys": (200, 210)}


@dataclass(frozen=True)
class Setting:
    spec: AttentionSpec
    captures: tuple[Tensor, ...]
    listing: Listing

    def keep(self) -> Tensor:
        """``[batch, heads, rows, keys]``."""
        given, (rows, keys) = self.listing, (self.listing.rows, self.listing.keys)
        m, n = torch.arange(rows)[:, None], torch.arange(keys)
        names = {f"t{slot}": each for slot, each in enumerate(self.captures)}
        keep = torch.as_tensor(eval(self.spec_text, {"m": m, "n": n, **names})).expand(
            given.batch, given.heads, rows, keys
        )
        left, right = given.band
        keep = keep & (n <= m + right) if given.mask.right else keep
        return keep & (n >= m + left) if given.mask.left else keep

    @property
    def spec_text(self) -> str:
        from attnfuse.score import text

        return text(self.listing.mask.program)


def setting(name: str, band: str, rows: int, keys: int, *, everywhere: bool = False) -> Setting:
    program, kinds = MASKS[name]
    captured = tuple(Captured(tuple(kind[:-1].split("[")[1].split(",")), kind.split("[")[0]) for kind in kinds)
    sizes = {"b0": 2, "h": 3, "m": rows, "n": keys}
    generator = torch.Generator().manual_seed(rows)
    captures = []
    for each in captured:
        shape = [sizes[axis] if axis in each.axes else 1 for axis in ("b0", "h", "m", "n")]
        drawn = torch.rand(shape, generator=generator)
        captures.append(drawn > 0.98 if each.dtype == "bool" else (drawn < 0.03).flatten(1).cumsum(1).view(shape))
    strides = tuple(
        x.stride(place)
        for x, each in zip(captures, captured, strict=True)
        for place, axis in enumerate(("b0", "h", "m", "n"))
        if axis in each.axes
    )
    varying = {axis for each in captured for axis in each.axes}
    left, right = BANDS[band]
    mask = Mask(
        parse(program),
        captured,
        0,
        False,
        HEIGHT,
        WIDTH,
        -(-keys // WIDTH),
        left is not None,
        right is not None,
        everywhere,
    )
    listing = Listing(
        mask, 2 if "b0" in varying else 1, 3 if "h" in varying else 1, rows, keys, (left or 0, right or 0), strides, ()
    )
    return Setting(AttentionSpec(captures=captured), tuple(captures), listing)


def expected(given: Setting) -> list[list[int]]:
    """Of each row tile the tiles that keep something, from the last to the first; cut unless they keep everything."""
    found, keep, keys = [], given.keep().flatten(0, 1), given.listing.keys
    for pair in keep:
        for rows in pair.split(HEIGHT):
            tiles = list(enumerate(rows.split(WIDTH, dim=1)))
            entries = [
                2 * tile + int(not (part.all() and part.shape[1] == WIDTH)) for tile, part in tiles if part.any()
            ]
            if given.listing.mask.everywhere and not rows.any(dim=1).all():
                entries = [2 * tile + 1 for tile, _ in tiles]
            found.append(entries[::-1])
    assert keys
    return found


def listed(given: Setting) -> list[list[int]]:
    lists = given.listing.launcher(torch.device("cpu"))(given.captures)
    assert lists.shape[-1] == given.listing.length
    return [each[1 : 1 + int(each[0])].tolist() for each in lists.flatten(0, 2)]


def assert_lists(given: Setting) -> None:
    """Exactly what the mask keeps; where ranges decide, perhaps some tiles more, and some cut that are whole."""
    for found, wanted in zip(listed(given), expected(given), strict=True):
        if not wanted:
            # a forward needs a tile
            assert len(found) == 1 or given.listing.mask.ranged
            assert all(entry % 2 for entry in found)
        elif given.listing.mask.ranged:
            assert found == sorted(found, reverse=True)
            assert {entry // 2 for entry in wanted} <= {entry // 2 for entry in found}
            assert {entry for entry in found if entry % 2 == 0} <= set(wanted)
        else:
            assert found == wanted


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_those_of_the_mask(name: str, band: str) -> None:
    assert_lists(setting(name, band, 50, 150))


@pytest.mark.parametrize("name", MASKS)
def test_odd_sizes(name: str) -> None:
    for rows, keys in ((48, 16), (1, 33)):
        assert_lists(setting(name, "open", rows, keys))


def test_ranges_decide_where_rows_and_keys_are_read_apart() -> None:
    decided = {name for name in MASKS if setting(name, "open", 1, 33).listing.mask.ranged}
    assert decided == {"documents", "padding", "nothing", "indices"}
    # every tile of paddings and documents in order is called what it is
    for name in ("padding", "documents"):
        given = setting(name, "open", 50, 150)
        assert listed(given) == [entries or [2 * (given.listing.length - 3) + 1] for entries in expected(given)]


@pytest.mark.parametrize("name", MASKS)
def test_rows_that_keep_nothing_see_everything(name: str) -> None:
    given = setting(name, "open", 50, 150, everywhere=True)
    empty = [not rows.any(dim=1).all() for pair in given.keep().flatten(0, 1) for rows in pair.split(HEIGHT)]
    everything = [2 * tile + 1 for tile in range(given.listing.length - 2)][::-1]
    for found, some in zip(listed(given), empty, strict=True):
        assert found == everything or not some
    assert_lists(given)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", MASKS)
def test_row_tiles_of_each_key_tile(name: str, band: str) -> None:
    """What a backward walks: the same mask, rows and keys having changed places."""
    given = setting(name, band, 150, 50)
    meta = BackwardMeta(64, 64, WIDTH, HEIGHT, left=given.listing.mask.left, right=given.listing.mask.right)
    shape = (2, 3, given.listing.rows, 64)
    lister = row_tiles_of(
        given.listing.mask.program, given.spec, meta, shape, given.listing.keys, given.listing.band,
        given.listing.strides, (), wide=False,
    )  # fmt: skip
    lists = lister.launcher(torch.device("cpu"))(given.captures)
    found = [each[1 : 1 + int(each[0])].tolist() for each in lists.flatten(0, 2)]
    wanted = [
        [2 * tile + int(not (part.all() and part.shape[0] == WIDTH)) for tile, part in enumerate(tiles) if part.any()]
        for pair in given.keep().flatten(0, 1)
        for tiles in (keys.split(WIDTH) for keys in pair.split(HEIGHT, dim=1))
    ]
    assert (lister.mask.left, lister.mask.right) == (given.listing.mask.right, given.listing.mask.left)
    for mine, each in zip(found, wanted, strict=True):
        if not lister.mask.ranged and each:
            assert mine == each[::-1]
        assert {entry // 2 for entry in each} <= {entry // 2 for entry in mine}
        assert {entry for entry in mine if entry % 2 == 0} <= set(each)
