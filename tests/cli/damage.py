"""Ways in which a .pt2 can be unusable, as functions from a good archive's bytes to a bad one's."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Edit = Callable[[str, bytes], bytes | None]


def edited(archive: bytes, edit: Edit) -> bytes:
    """The archive with ``edit(record, data)`` for each record's data; None drops the record."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            data = edit(name.partition("/")[2], source.read(name))
            if data is not None:
                target.writestr(name, data)
    return result.getvalue()


def with_record(archive: bytes, record: str, data: bytes) -> bytes:
    """The archive with one record more."""
    result = io.BytesIO(archive)
    with zipfile.ZipFile(result, "a") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that is there already
        root = target.namelist()[0].partition("/")[0]
        target.writestr(f"{root}/{record}", data)
    return result.getvalue()


def with_program(archive: bytes, change: Callable[[Any], None]) -> bytes:
    """The archive with ``change`` made to its program's JSON."""

    def edit(record: str, data: bytes) -> bytes:
        if record != "models/model.json":
            return data
        program = json.loads(data)
        change(program)
        return json.dumps(program).encode()

    return edited(archive, edit)


def truncated(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def bit_flipped(archive: bytes) -> bytes:
    """One bit of one weight."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        info = next(info for info in source.infolist() if info.filename.endswith("data/weights/weight_0"))
        weight = source.read(info)
    place = archive.index(weight, info.header_offset) + 5
    return archive[:place] + bytes([archive[place] ^ 0x10]) + archive[place + 1 :]


def plain_zip(archive: bytes) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as target:
        target.writestr("letter/readme.txt", "dear reader")
    return result.getvalue()


def without_program(archive: bytes) -> bytes:
    return edited(archive, lambda record, data: None if record.startswith("models/") else data)


def without_inputs(archive: bytes) -> bytes:
    return edited(archive, lambda record, data: None if record.startswith("data/sample_inputs/") else data)


def doubled(archive: bytes) -> bytes:
    return with_record(archive, "models/model.json", b"{}")


def not_json(archive: bytes) -> bytes:
    return edited(archive, lambda record, data: b"{" if record == "models/model.json" else data)


def other_schema(archive: bytes) -> bytes:
    return edited(archive, lambda record, data: b"{}" if record == "models/model.json" else data)


def unknown_operator(archive: bytes) -> bytes:
    return edited(archive, lambda record, data: data.replace(b"aten.linear.default", b"nobody.knows.default"))


def planted(canary: str) -> torch.Tensor:
    """What unpickling calls: leaves a file, and returns something that fits."""
    Path(canary).touch()
    return torch.ones(2, 24, 16)


@dataclass(frozen=True)
class _Runs:
    """Pickles as a call of :func:`planted`."""

    canary: str

    def __reduce__(self) -> tuple[Any, ...]:
        return planted, (self.canary,)


def pickled_inputs(archive: bytes, canary: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(((_Runs(canary),), {}), buffer)
    return edited(archive, lambda record, data: buffer.getvalue() if "sample_inputs" in record else data)


def pickled_weight(archive: bytes, canary: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(_Runs(canary), buffer)

    def edit(record: str, data: bytes) -> bytes:
        if record == "data/weights/weight_0":
            return buffer.getvalue()
        if record != "data/weights/model_weights_config.json":
            return data
        config = json.loads(data)
        for entry in config["config"].values():
            entry["use_pickle"] = entry["path_name"] == "weight_0"
        return json.dumps(config).encode()

    return edited(archive, edit)


def pickled_constant(archive: bytes, canary: str) -> bytes:
    def edit(record: str, data: bytes) -> bytes:
        if record != "data/constants/model_constants_config.json":
            return data
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {**json.loads(data)["config"], "thing": entry}}).encode()

    return with_record(edited(archive, edit), "data/constants/opaque_obj_0", pickle.dumps(_Runs(canary)))


def evaluated_size(archive: bytes, canary: str) -> bytes:
    def change(part: Any) -> None:
        for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            change(item)
        if isinstance(part, dict) and "expr_str" in part:
            part["expr_str"] = f"open({canary!r}, 'w')"

    return with_program(archive, change)


def executed_guard(archive: bytes, canary: str) -> bytes:
    return with_program(archive, lambda program: program.update(guards_code=[f"open({canary!r}, 'w') is not None"]))


def imported_module(archive: bytes, canary: str) -> bytes:
    """An argument tree whose context names a module to import, which lies beside the canary."""
    Path(canary).with_name("cuckoo.py").write_text(f"open({canary!r}, 'w')")
    context = json.dumps({"__enum__": True, "fqn": "cuckoo:x", "name": "y"})
    tree = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])

    def change(program: Any) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = tree

    return with_program(archive, change)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda archive: b"", "is empty"),
    "truncated": (truncated, "truncated or damaged"),
    "bit-flipped": (bit_flipped, "does not match its checksum"),
    "no-zip": (lambda archive: b"no archive at all\n" * 9, "not a zip archive"),
    "plain-zip": (plain_zip, "a zip archive but not a .pt2"),
    "no-program": (without_program, "cannot be loaded"),
    "no-inputs": (without_inputs, "cannot be loaded"),
    "two-of-one-name": (doubled, "two members of one name"),
    "no-json": (not_json, "not JSON"),
    "other-schema": (other_schema, "cannot be loaded"),
    "unknown-operator": (unknown_operator, "torch.ops.nobody.knows.default"),
}

THREATS: dict[str, tuple[Callable[[bytes, str], bytes], str]] = {
    "pickled-inputs": (pickled_inputs, "it pickles tests.cli.damage.planted"),
    "pickled-weight": (pickled_weight, "it pickles tests.cli.damage.planted"),
    "pickled-constant": (pickled_constant, "a pickled constant"),
    "evaluated-size": (evaluated_size, "a size that is no arithmetic"),
    "executed-guard": (executed_guard, "a guard that is no comparison"),
    "imported-module": (imported_module, "imports code"),
}
