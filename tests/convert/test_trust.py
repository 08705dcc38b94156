"""Checkpoints of strangers: they lead nowhere, cost little to refuse, and changes are found. Nothing is lost either."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.checksums import CHECKSUMS
from convert.conversion import convert
from convert.formats.npz import read_npz
from convert.formats.orbax import read_orbax
from convert.formats.safetensors import read_safetensors
from convert.layouts.registry import LAYOUTS
from convert.tensors import CheckpointError, Tensor
from pi0.assets import Assets, AssetsError
from pi0.parameters import LayoutError, parameters
from pi0.robots.normalize import NormStats
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from tests.pi0.test_reading import archive

CONFIG = get_variant("tiny", action_dim=8, max_token_len=24)
STATS = {key: NormStats(*np.array([[1.0], [2.0], [-1.0], [3.0]]) * np.ones(4)) for key in ("state", "actions")}


def write(folder: Path, layout: str = "pi0_torch", **changes) -> Path:
    ours = {name: Tensor.of(np.ones(p.shape, np.float32)) for name, p in parameters(CONFIG).items()}
    assets = {"asset_id": "arm", "tokenizer": TextTokenizer(BUNDLED).reference(), "robot": "metaworld"} | changes
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(folder, LAYOUTS["pi0_jax"], Assets(CONFIG, STATS, normalization="zscore", **assets), ours)
    write_checkpoint(checkpoint, folder, layout)
    return folder


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


# ---- nothing lost ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "target", ["run", "run/checkpoints", "run/checkpoints/200", "run/checkpoints/200/new", "documents"]
)
def test_overwrite_deletes_neither_the_source_nor_what_is_not_ours(target: str, tmp_path: Path) -> None:
    for step in (100, 200):
        write(tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        convert(tmp_path / "run", tmp_path / target, to="pi0_torch", dtype="bfloat16", overwrite=True)
    assert contents(tmp_path) == before


def test_what_we_wrote_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    for layout in ("lerobot", "pi0_jax", "openpi_torch", "pi0_torch"):
        convert(source, tmp_path / "out", to=layout, overwrite=True)
        assert open_checkpoint(tmp_path / "out").layout.name == layout
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other files: notes\.md"):
        convert(source, tmp_path / "out", to="pi0_jax", overwrite=True)


def test_targets_are_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    source = write(tmp_path / "source")
    monkeypatch.setattr("convert.conversion.open_checkpoint", lambda *_, **__: pytest.fail("the source was opened"))
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        convert(source, write(tmp_path / "there"), to="pi0_jax")


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_folders_with_characters_that_have_a_meaning_in_addresses(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    for name in ("with space", "run#3", "why?", "50%", "a|b", "lr%201e-4", "ü"):
        convert(source, tmp_path / name / "checkpoint", to="openpi_jax")
        assert open_checkpoint(tmp_path / name / "checkpoint").ours["paligemma.embedding"].read(()).all()
    assert not (tmp_path / "lr 1e-4").exists()
    with pytest.raises(CheckpointError, match="has a backslash in its path"):  # which tensorstore takes for a slash
        convert(source, tmp_path / "back\\slash" / "checkpoint", to="openpi_jax")
    assert not (tmp_path / "back").exists() and not list((tmp_path / "back\\slash").iterdir())


def test_run_folders_of_lerobot(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "checkpoints" / "020000" / "pretrained_model", "lerobot")
    (tmp_path / "run" / "checkpoints" / "last").symlink_to("020000")
    assert open_checkpoint(tmp_path / "run").folder == folder
    assert open_checkpoint(tmp_path / "run", step=20_000).folder == folder
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has \[20000\]"):
        open_checkpoint(tmp_path / "run", step=5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "assets/arm/norm_stats.json", "assets"])
def test_links_that_leave_a_checkpoint(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises((CheckpointError, AssetsError), match=r"is a link to .*elsewhere"):
        open_checkpoint(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "elsewhere")
    (folder / name).symlink_to(folder / "elsewhere")
    open_checkpoint(folder)


def test_links_in_orbax_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "pi0_jax")
    (folder / "params" / "d").rename(tmp_path / "d")
    (folder / "params" / "d").symlink_to(tmp_path / "d")
    with pytest.raises(CheckpointError, match="params/d is a link to"):
        open_checkpoint(folder)


def test_names_of_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = LAYOUTS["pi0_torch"].shapes(CONFIG)
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
        with pytest.raises(CheckpointError, match=r"index\.json.*is not a path below"):
            open_checkpoint(folder)
    for weight_map in ([1], {"a": 5}, None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
            open_checkpoint(folder)


def test_keys_of_orbax(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "pi0_jax")
    for key in ("../../elsewhere", "/etc"):
        metadata = {"tree_metadata": {"x": {"key_metadata": [{"key": key}], "value_metadata": {}}}}
        (folder / "params" / "_METADATA").write_text(json.dumps(metadata))
        with pytest.raises(CheckpointError, match="is not a path below"):
            read_orbax(folder / "params")
    for wrong in ([], [{"key": 5}], [{}]):
        metadata["tree_metadata"]["x"]["key_metadata"] = wrong
        (folder / "params" / "_METADATA").write_text(json.dumps(metadata))
        with pytest.raises(CheckpointError, match="_METADATA cannot be read"):
            read_orbax(folder / "params")


def test_state_files_of_lerobot(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", "lerobot")
    shutil.rmtree(folder / "assets")
    processor = json.loads((folder / "policy_preprocessor.json").read_text())
    (step,) = [s for s in processor["steps"] if "state_file" in s]
    (folder / step["state_file"]).rename(tmp_path / "stats.safetensors")
    step["state_file"] = "../stats.safetensors"
    (folder / "policy_preprocessor.json").write_text(json.dumps(processor))
    with pytest.raises(LayoutError, match="is not a path below"):
        open_checkpoint(folder, CONFIG)


@pytest.mark.parametrize("field", ["tokenizer", "action_tokenizer"])
@pytest.mark.parametrize("source", ["/tmp/tokenizer.model", "../tokenizer.model", "link", 5])
def test_tokenizers_outside_of_a_checkpoint(field: str, source, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    (folder / "link").symlink_to("/etc/passwd")
    edit(folder / "config.json", **{field: {"kind": "sentencepiece", "source": source, "sha256": "0"}})
    with pytest.raises(AssetsError, match=rf"config\.json: {field}\.source: .*copy the file there"):
        open_checkpoint(folder)


def test_a_tokenizer_of_this_machine_travels_along(tmp_path: Path) -> None:
    shutil.copyfile(TextTokenizer(BUNDLED)._pieces and "pi0/sample/tokenizer.model", tmp_path / "mine.model")
    reference = TextTokenizer(tmp_path / "mine.model").reference()
    folder = write(tmp_path / "checkpoint", tokenizer=reference)
    (tmp_path / "mine.model").unlink()
    folder = folder.rename(tmp_path / "moved")
    loaded = open_checkpoint(folder).assets.tokenizer
    assert loaded == reference | {"source": str(folder / "assets" / "tokenizer.model")}
    convert(folder, tmp_path / "again", to="pi0_jax")
    again = open_checkpoint(tmp_path / "again").assets.tokenizer
    assert TextTokenizer.from_reference(again).sha256 == reference["sha256"]


@pytest.mark.parametrize("asset_id", ["../x", "/etc", "fast_tokenizer", "config.json", "."])
def test_asset_ids_that_are_no_name(asset_id: str, tmp_path: Path) -> None:
    with pytest.raises(AssetsError, match="asset_id"):
        Assets(CONFIG, STATS, asset_id).save(tmp_path / "assets")
    assert not list(tmp_path.iterdir())
    edit(write(tmp_path / "checkpoint") / "config.json", asset_id=asset_id)
    with pytest.raises(AssetsError, match=r"config\.json|asset_id"):
        open_checkpoint(tmp_path / "checkpoint")


# ---- bombs -----------------------------------------------------------------------------------------------------------


def test_headers_of_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content, said in (
        (struct.pack("<Q", 2**40) + b"{" * 100, "header of 1,099,511,627,776 bytes is not JSON"),
        (struct.pack("<Q", 400_000) + b"[" * 400_000, "is not JSON: maximum recursion"),
        (struct.pack("<Q", 20 << 20) + b" " * (20 << 20), "has more than 16,777,216 characters"),
        (b"", "is not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{said}"):
            read_safetensors(file)
    for shape in ([2**40, 2**40], [-1], ["a"], [True]):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_safetensors(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_safetensors(file)


@pytest.mark.parametrize(("shape", "chunks", "said"), [(2**40, 100, "declares arrays of"), (100, 2**40, "its chunks")])
def test_arrays_that_are_larger_than_what_is_stored(shape: int, chunks: int, said: str, tmp_path: Path) -> None:
    """Missing chunks are read as zeros: a file of 100 bytes could be an array of any size."""
    zarray = {"chunks": [chunks], "compressor": None, "dtype": "<f4", "fill_value": 0, "filters": None, "order": "C"}
    (tmp_path / "params" / "x").mkdir(parents=True)
    (tmp_path / "params" / "x" / ".zarray").write_text(json.dumps({**zarray, "shape": [shape], "zarr_format": 2}))
    metadata = {"tree_metadata": {"x": {"key_metadata": [{"key": "x"}], "value_metadata": {}}}}
    (tmp_path / "params" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"params.*{said}"):
        read_orbax(tmp_path / "params")


def test_compressed_arrays(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(6.0).reshape(2, 3))
    assert read_npz(tmp_path / "a.npz")["a"].read((1,)).tolist() == [3, 4, 5]
    archive(tmp_path / "b.npz", b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", bytes(100))
    with pytest.raises(CheckpointError, match=r"b\.npz.*is truncated"):
        read_npz(tmp_path / "b.npz")
    archive(tmp_path / "c.npz", b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"c\.npz.*expected an array of numbers"):
        read_npz(tmp_path / "c.npz")


# ---- changed files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "assets/arm/norm_stats.json"])
def test_sidecar_files_that_changed(name: str, tmp_path: Path) -> None:
    convert(write(tmp_path / "source"), tmp_path / "out", to="pi0_torch")
    file, table = tmp_path / "out" / name, tmp_path / "out" / CHECKSUMS
    content = file.read_text()
    file.write_text(content + "\n")
    with pytest.raises(CheckpointError, match=f"{name} is not what was written .by checksums.json"):
        open_checkpoint(tmp_path / "out")
    signed = json.loads(table.read_text())
    table.write_text(json.dumps({key: value for key, value in signed.items() if key != name}))
    open_checkpoint(tmp_path / "out")  # as the message says
    table.write_text(json.dumps(signed))
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(tmp_path / "out")
    file.write_text(content)
    for text, said in (("{}", "was it emptied"), ("[]", "holds list"), ('{"a": 1}', "no table"), ("{", "is not JSON")):
        table.write_text(text)
        with pytest.raises(CheckpointError, match=rf"checksums\.json.*{said}"):
            open_checkpoint(tmp_path / "out")
    table.unlink()
    open_checkpoint(tmp_path / "out")  # as those of older versions, which have none
