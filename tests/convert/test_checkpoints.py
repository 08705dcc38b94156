from __future__ import annotations

import dataclasses
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pi0_jax
import pi0_torch
from convert import checkpoints
from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.conversion import convert
from convert.conversion import main as convert_main
from convert.formats import orbax
from convert.formats.orbax import read_orbax, write_orbax
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.layouts.registry import LAYOUTS, WRITABLE
from convert.tensors import CheckpointError, Tensor
from pi0.assets import Assets
from pi0.parameters import LayoutError, parameters
from pi0.robots.normalize import NormStats
from pi0.storage import new_folder
from pi0.variants import get_variant
from tests.golden_case import CASES, FAST, GoldenCase

CONFIG = get_variant("tiny")
OF_PI0 = [name for name, layout in LAYOUTS.items() if "pi0" in layout.kinds]


def random_checkpoint(variant: str = "tiny", dtype: str = "float32") -> Checkpoint:
    config, rng = get_variant(variant), np.random.default_rng(0)
    ours = {name: Tensor.of((rng.normal(size=p.shape) * 0.1).astype(dtype)) for name, p in parameters(config).items()}
    stats = NormStats.from_data(rng.normal(size=(10, 4)))
    assets = Assets(config, {"state": stats, "actions": stats}, "lab", "zscore", {"kind": "sentencepiece"}, "metaworld")
    return Checkpoint(Path("memory"), LAYOUTS["pi0_jax"], assets, ours)


def write(checkpoint: Checkpoint, folder: Path, layout: str) -> Path:
    with new_folder(folder) as temporary:
        write_checkpoint(checkpoint, temporary, layout)
    return folder


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        one, other = a[name].read(()), b[name].read(())
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes(), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint in every layout; not to be changed."""
    root = tmp_path_factory.mktemp("stored")
    return {layout: write(random_checkpoint(), root / layout, layout) for layout in OF_PI0}


# ---- there and back


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize(
    ("variant", "dtype"), [("tiny", "bfloat16"), ("tiny_pi05", "float32"), ("tiny_pi0_fast", "float32")]
)
def test_files_keep_every_byte_and_the_assets(layout: str, variant: str, dtype: str, tmp_path):
    if get_variant(variant).kind not in LAYOUTS[layout].kinds:
        pytest.skip(f"{layout} has no such model")
    checkpoint = random_checkpoint(variant, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    opened = open_checkpoint(write(checkpoint, tmp_path / "out", layout))
    assert opened.layout.name == layout
    assert_same(opened.ours, checkpoint.ours)
    assert opened.assets.model == checkpoint.assets.model and opened.assets.tokenizer == checkpoint.assets.tokenizer
    np.testing.assert_array_equal(opened.assets.norm_stats["state"].q99, checkpoint.assets.norm_stats["state"].q99)


@pytest.mark.parametrize("name", [*CASES, FAST])
def test_openpi_checkpoints_go_around_all_layouts(name: str, tmp_path):
    """Both of openpi's styles: released key paths (π0) and those of a training run (π0.5)."""
    case = GoldenCase(name)
    source = open_checkpoint(case.checkpoint, case.config("float32"))
    convert(case.checkpoint, tmp_path / "torch", to="pi0_torch", config=case.config("float32"))
    convert(tmp_path / "torch", tmp_path / "lerobot", to="lerobot")
    convert(tmp_path / "lerobot", tmp_path / "jax", to="pi0_jax", config=case.config("float32"))
    convert(tmp_path / "jax", tmp_path / "openpi", to="openpi_jax")
    assert_same(read_orbax(tmp_path / "openpi" / "params"), read_orbax(case.checkpoint / "params"))
    assert_same(open_checkpoint(tmp_path / "openpi").ours, source.ours)


def test_openpi_has_no_pi0_fast_in_pytorch(tmp_path):
    with pytest.raises(LayoutError, match="openpi_torch cannot hold pi0_fast; it holds pi0, pi05"):
        convert(GoldenCase(FAST).checkpoint, tmp_path / "out", to="openpi_torch")
    assert not (tmp_path / "out").exists()


def test_conversion_is_deterministic(stored, tmp_path):
    for name in ("a", "b"):
        convert(stored["pi0_jax"], tmp_path / name, to="pi0_torch")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize("layout", OF_PI0)
def test_models_load_from_every_layout(stored, layout: str):
    """Both frameworks, in the dtypes asked for."""
    model = pi0_jax.load(stored[layout], dtype="bfloat16", param_dtype="bfloat16")
    assert model.config.runtime.dtype == "bfloat16" and model.paligemma.embedding[...].dtype == "bfloat16"
    module = pi0_torch.load(stored[layout], dtype="bfloat16", param_dtype="bfloat16")
    assert module.config.runtime.dtype == "bfloat16" and str(module.paligemma.embedding.dtype) == "torch.bfloat16"
    assert str(pi0_torch.load(stored[layout]).paligemma.embedding.dtype) == "torch.float32"


# ---- other libraries' files


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_orbax_reads_what_we_write(dtype, tmp_path):
    import orbax.checkpoint as ocp

    tensors = {name: Tensor.of(np.arange(6.0).astype(dtype).reshape(2, 3)) for name in ("a/b", "a/c", "d")}
    write_orbax(tmp_path / "params", tensors, ("params",))
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "params")["params"]
    for array in (restored["a"]["b"], restored["a"]["c"], restored["d"]):
        assert np.asarray(array).tobytes() == tensors["d"].read(()).tobytes()


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_we_read_what_orbax_writes(zarr3: bool, ocdbt: bool, tmp_path):
    import orbax.checkpoint as ocp

    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(4, ml_dtypes.bfloat16)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "x", args=ocp.args.PyTreeSave(tree))
    found = read_orbax(tmp_path / "x")
    assert_same(found, {"a/b": Tensor.of(tree["a"]["b"]), "c": Tensor.of(tree["c"])})


def test_safetensors_library_reads_what_we_write(tmp_path):
    from safetensors.torch import load_file

    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones((3,), ml_dtypes.bfloat16)}
    write_safetensors(tmp_path / "m", {k: Tensor.of(v) for k, v in tensors.items()}, {"format": "pt"})
    loaded = load_file(tmp_path / "m")
    assert loaded["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert str(loaded["y"].dtype) == "torch.bfloat16" and loaded["y"].tolist() == [1, 1, 1]


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "m")
    found = read_safetensors(tmp_path / "m")
    assert_same(
        {k: found[k] for k in ("x", "y")},
        {"x": Tensor.of(np.arange(6, dtype="f4").reshape(2, 3)), "y": Tensor.of(np.ones(3, ml_dtypes.bfloat16))},
    )


# ---- large tensors, in slices


def set_piece(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("convert.tensors", "convert.formats.orbax"):
        monkeypatch.setattr(f"{module}.PIECE", size)


def test_orbax_reads_what_we_write_in_slices(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    set_piece(monkeypatch, 50)
    arrays = {name: np.arange(n * 5, dtype=np.float32).reshape(n, 5) for name, n in (("a", 7), ("b", 2), ("c", 8))}
    write_orbax(tmp_path / "params", {name: Tensor.of(array) for name, array in arrays.items()})
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "params")
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)
    assert_same(read_orbax(tmp_path / "params"), {name: Tensor.of(array) for name, array in arrays.items()})


@pytest.mark.parametrize("layout", OF_PI0)
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_large_tensors_are_written_as_small_ones(layout: str, dtype, stored, tmp_path, monkeypatch):
    checkpoint = random_checkpoint(dtype=dtype)
    whole = write(checkpoint, tmp_path / "whole", layout)
    set_piece(monkeypatch, 1000)
    monkeypatch.setattr(orbax, "CACHED", 5000)
    sliced = write(open_checkpoint(write(checkpoint, tmp_path / "jax", "openpi_jax")), tmp_path / "sliced", layout)
    assert_same(open_checkpoint(sliced).ours, checkpoint.ours)
    if (whole / "model.safetensors").exists():
        assert (sliced / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("held", [1, 60, 1 << 20])
@pytest.mark.parametrize("chunk", [(7, 2, 5), (7, 2, 2), (3, 1, 5), (1, 2, 5), (2, 2, 3)])
def test_any_part_of_any_chunks(chunk: tuple[int, ...], held: int, tmp_path, monkeypatch):
    """Slices that fit the chunks and that do not, read back and forth, of which none changes another."""
    set_piece(monkeypatch, 8)
    monkeypatch.setattr(orbax, "CACHED", held)
    array = np.arange(70, dtype=np.float32).reshape(7, 2, 5)
    write_orbax(tmp_path, {"a": Tensor.of(array), "b": Tensor.of(-array)}, chunks={"a": chunk, "b": chunk})
    stored = read_orbax(tmp_path)
    for index in [(), (3,), (slice(2, 5),), (slice(None), 1), (6, 0), (0, 1, slice(None)), (slice(1, 7), 0), (1, 1)]:
        for name, whole in (("a", array), ("b", -array)):
            part = stored[name].read(index)
            np.testing.assert_array_equal(part, whole[index])
            if part.flags.writeable:
                part[...] = 0


def test_each_chunk_is_decoded_once(tmp_path, monkeypatch):
    """All layers in one chunk, as Orbax stores them: reading layer by layer decodes it once, not once for each."""
    array = np.arange(70, dtype=np.float32).reshape(7, 2, 5)
    write_orbax(tmp_path, {"a": Tensor.of(array)})
    decode, calls = orbax._decode, []
    monkeypatch.setattr(orbax, "_decode", lambda view: calls.append(view) or decode(view))
    tensor = read_orbax(tmp_path)["a"]
    for part in (0, 1):
        for layer in range(7):
            np.testing.assert_array_equal(tensor.read((layer, part)), array[layer, part])
    assert len(calls) == 1


# ---- anything wrong with any one tensor

Damage = Callable[[dict[str, Tensor], str], None]


def _remove(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_copy"] = tensors[name]


def _rename(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_copy"] = tensors.pop(name)


def _reshape(tensors: dict[str, Tensor], name: str) -> None:
    array = tensors[name].read(())
    tensors[name] = Tensor.of(np.concatenate([array, array[:1]]))


def _transpose(tensors: dict[str, Tensor], name: str) -> None:
    array = tensors[name].read(())
    tensors[name] = Tensor.of(array[None] if array.T.shape == array.shape else array.T)


@pytest.mark.parametrize("damage", [_remove, _add, _rename, _reshape, _transpose])
@pytest.mark.parametrize("layout", OF_PI0)
def test_any_damaged_tensor_is_refused_by_name(layout: str, damage: Damage, stored, tmp_path, monkeypatch):
    """Every tensor in turn; the files are those in `stored`, what is read from them is damaged on the way."""
    folder = stored[layout]
    safetensors = LAYOUTS[layout].format == "safetensors"
    reader = "read_safetensors" if safetensors else "read_orbax"
    file = folder / ("model.safetensors" if safetensors else "params")
    intact = {n: Tensor.of(np.array(t.read(()))) for n, t in getattr(checkpoints, reader)(file).items()}
    for name in intact:
        if damage is _remove and name in LAYOUTS[layout].unused_tensors(CONFIG, np.dtype(np.float32)):
            continue  # it may be missing
        damaged = dict(intact)
        damage(damaged, name)
        monkeypatch.setattr(checkpoints, reader, lambda *_, damaged=damaged: damaged)
        for attempt in (
            lambda: pi0_jax.load(folder),
            lambda: pi0_torch.load(folder),
            lambda: convert(folder, tmp_path / "out", to="pi0_jax"),
        ):
            with pytest.raises(LayoutError) as error:
                attempt()
            assert name in str(error.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [_remove, _add, _rename, _reshape, _transpose])
def test_any_damaged_tensor_is_refused_where_sizes_follow_from_shapes(damage: Damage, tmp_path, monkeypatch):
    """As above for a checkpoint as openpi publishes it, without a config of ours."""
    config = dataclasses.replace(CONFIG, image_resolution=(28, 28), kind="pi05")
    rng = np.random.default_rng(0)
    ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(config).items()}
    intact = {n: Tensor.of(t.read(())) for n, t in LAYOUTS["openpi_jax"].from_ours(config, ours).items()}
    (tmp_path / "_METADATA").touch()
    monkeypatch.setattr(checkpoints, "read_orbax", lambda *_: intact)
    assert open_checkpoint(tmp_path).assets.model.paligemma == config.paligemma
    for name in intact:
        if damage is _reshape and name.endswith("input_embedding"):
            continue  # another vocabulary is another model, and as good
        damaged = dict(intact)
        damage(damaged, name)
        monkeypatch.setattr(checkpoints, "read_orbax", lambda *_, damaged=damaged: damaged)
        with pytest.raises(LayoutError) as error:
            open_checkpoint(tmp_path)
        assert name in str(error.value)


@pytest.mark.parametrize("damage", [_remove, _add, _rename, _reshape])
def test_damaged_files_are_refused(damage: Damage, stored, tmp_path, capsys):
    """The same through real files and the command."""
    folder = shutil.copytree(stored["pi0_torch"], tmp_path / "source")
    tensors = {n: Tensor.of(np.array(t.read(()))) for n, t in read_safetensors(folder / "model.safetensors").items()}
    damage(tensors, "action_in_proj.weight")
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(SystemExit) as stop:
        convert_main([str(folder), str(tmp_path / "out"), "--to", "openpi_jax"])
    assert stop.value.code == 1 and "action_in_proj.weight" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -4096, -1])
def test_truncated_safetensors(keep: int, stored, tmp_path):
    folder = shutil.copytree(stored["pi0_torch"], tmp_path / "source")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_trailing_bytes_in_safetensors(stored, tmp_path):
    folder = shutil.copytree(stored["pi0_torch"], tmp_path / "source")
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="its header says"):
        open_checkpoint(folder)


def test_any_damaged_byte_of_a_safetensors_header(tmp_path):
    """Refused, or still a header that accounts for every byte of the file; never another error."""
    file, x, y = tmp_path / "m", np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
    write_safetensors(file, {"x": Tensor.of(x), "y": Tensor.of(y)})
    intact, refused = file.read_bytes(), 0
    for position in range(len(intact) - 24 - 8):
        for mask in (0x01, 0x02, 0x10, 0x80):
            damaged = bytearray(intact)
            damaged[position] ^= mask
            file.write_bytes(damaged)
            try:
                tensors = read_safetensors(file)
            except CheckpointError:
                refused += 1
            else:
                assert sum(tensor.read(()).nbytes for tensor in tensors.values()) == 24 + 8
    assert refused > 100


@pytest.mark.parametrize(
    "header",
    [
        "5",
        "[]",
        '{"x": 5}',
        '{"x": {}}',
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "name": "y"}}',
        '{"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        '{"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}',
        '{"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        '{"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        '{"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        '{"x": {"dtype": "F32", "shape": [3], "data_offsets": [-4, 8]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',  # a hole
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        ' "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',  # two tensors in the same bytes
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        ' "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        "[" * 100_000,
    ],
)
def test_safetensors_headers_that_make_no_sense(header: str, tmp_path):
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=r"m (is not a safetensors file|is damaged)"):
        read_safetensors(tmp_path / "m")


def test_a_header_longer_than_memory(tmp_path):
    (tmp_path / "m").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_safetensors(tmp_path / "m")


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_any_missing_or_truncated_orbax_file(zarr3: bool, ocdbt: bool, tmp_path):
    """Refused, or one that holds none of the weights; never read as zeros, which is what zarr does by itself."""
    import orbax.checkpoint as ocp

    b, c = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, ml_dtypes.bfloat16)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "x", args=ocp.args.PyTreeSave({"a": {"b": b}, "c": c}))
    refused = []
    for file in sorted(f for f in (tmp_path / "x").rglob("*") if f.is_file()):
        intact = file.read_bytes()
        for damaged in (None, intact[: len(intact) // 2]):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                assert_same(read_orbax(tmp_path / "x"), {"a/b": Tensor.of(b), "c": Tensor.of(c)})
            except CheckpointError:
                refused.append(file.name)
            file.write_bytes(intact)
    assert refused.count("_METADATA") == 2
    assert len(refused) >= (4 if ocdbt else 10)  # metadata, and what the arrays are in: two files for each, or one


@pytest.mark.parametrize(
    "text", ["5", "[]", "{}", '{"tree_metadata": []}', '{"tree_metadata": {"a": {"key_metadata": 5}}}']
)
def test_orbax_metadata_that_makes_no_sense(text: str, tmp_path):
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(CheckpointError, match="_METADATA"):
        read_orbax(tmp_path)


def test_missing_orbax_files(stored, tmp_path):
    folder = shutil.copytree(stored["pi0_jax"], tmp_path / "source")
    data = max((f for f in (folder / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data.unlink()
    with pytest.raises(CheckpointError, match="params"):
        for tensor in open_checkpoint(folder).ours.values():
            tensor.read(())
    (folder / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="_METADATA"):
        open_checkpoint(folder)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="folder"):
        open_checkpoint(tmp_path / "file")


def test_whole_numbers_are_no_weights(stored, tmp_path):
    folder = shutil.copytree(stored["pi0_torch"], tmp_path / "source")
    tensors = dict(read_safetensors(folder / "model.safetensors"))
    tensors = {n: Tensor.of(np.array(t.read(()))) for n, t in tensors.items()}
    tensors["state_proj.bias"] = Tensor.of(tensors["state_proj.bias"].read(()).astype(np.int32))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(LayoutError, match=r"state_proj\.bias.*int32"):
        open_checkpoint(folder)


# ---- nothing partial is left behind


def test_an_existing_target_is_kept(stored, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="overwrite"):
        convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch")
    convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_failure_while_writing_leaves_nothing(stored, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.Assets, "save", fail)  # after the weights
    with pytest.raises(OSError, match="No space"):
        convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch")
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_keeps_what_was_there(stored, tmp_path, monkeypatch):
    """The weights are half written when one of them cannot be read; the old target stays as it was."""
    convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    read, count = checkpoints.read_orbax, iter(range(1000))

    def failing(folder: Path, *_) -> dict[str, Tensor]:
        def fail(tensor: Tensor, index: tuple[int | slice, ...]) -> np.ndarray:
            if next(count) == 20:
                raise CheckpointError("cannot be read")
            return tensor.read(index)

        return {n: dataclasses.replace(t, read=partial(fail, t)) for n, t in read(folder).items()}

    monkeypatch.setattr(checkpoints, "read_orbax", failing)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch", overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_verification_reads_what_was_written(stored, tmp_path, monkeypatch):
    def corrupt(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        write_safetensors(file, tensors, metadata)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(checkpoints, "write_safetensors", corrupt)
    with pytest.raises(CheckpointError, match="differs from what was read"):
        convert(stored["pi0_jax"], tmp_path / "out", to="pi0_torch")
    assert not list(tmp_path.iterdir())
