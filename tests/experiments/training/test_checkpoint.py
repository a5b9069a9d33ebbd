import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from manyheads.experiments.training.checkpoint import Checkpoints, checksums

DTYPES = ("float32", "bfloat16", "float16", "complex64", "int32", "uint8", "int16", "bool")


def draw(rng: np.random.Generator, dtype: str, shape: tuple[int, ...] = (4, 5)) -> jax.Array:
    values = rng.standard_normal(shape)
    if dtype == "complex64":
        values = values + 1j * rng.standard_normal(shape)
    return jnp.asarray(100 * values if "int" in dtype else values > 0 if dtype == "bool" else values, dtype)


@pytest.fixture
def arrays(rng) -> dict[str, jax.Array]:
    drawn = {f"{dtype}.value": draw(rng, dtype) for dtype in DTYPES}
    return {**drawn, "count": jnp.int32(rng.integers(1000))}


def same(one: dict[str, jax.Array], two: dict[str, jax.Array]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and np.asarray(one[name]).tobytes() == np.asarray(two[name]).tobytes()
        for name in one
    )


def total(array: jax.Array) -> int:
    return int(checksums({"": jnp.asarray(array)})[""][0])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_shows_every_changed_bit(dtype, rng):
    array = np.asarray(draw(rng, dtype, (37,)))
    changed = {total(array)}
    for _ in range(20):
        copy = array.copy()
        if dtype == "bool":
            copy[rng.integers(copy.size)] ^= True
        else:
            copy.view(np.uint8)[rng.integers(copy.nbytes)] ^= 1 << rng.integers(8)
        assert total(copy) != total(array)
        changed.add(total(copy))
    assert len(changed) > 2


def test_checksum_shows_what_sums_miss(rng):
    array = rng.standard_normal(1000).astype(np.float32)
    i, j = rng.choice(1000, 2, replace=False)
    swapped, flipped, opposite = array.copy(), array.copy(), array.copy()
    swapped[[i, j]] = swapped[[j, i]]
    flipped[[i, j]] *= -1
    opposite[j] = -opposite[i]
    exchanged = opposite.copy()
    exchanged[[i, j]] = exchanged[[j, i]]
    assert len({total(x) for x in (array, swapped, flipped, np.roll(array, 1), array[::-1])}) == 5
    assert total(opposite) != total(exchanged)
    assert total(np.float32([0.0])) != total(np.float32([-0.0]))


def test_checksum_does_not_depend_on_sharding(rng):
    array = draw(rng, "float32", (16, 24))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec(None, "a")):
        assert total(jax.device_put(array, NamedSharding(mesh, spec))) == total(array)


def test_round_trip_is_exact(tmp_path, arrays):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.restore(arrays) is None and checkpoints.last is None
    note = {"data": {"next_index": 7, "share": 0.1, "name": "é"}}
    checkpoints.save(7, arrays, note)
    assert checkpoints.last == 7
    reader = Checkpoints(tmp_path / "c")
    step, restored, found = reader.restore(arrays)
    assert step == 7 == reader.last and found["data"] == note["data"] and same(restored, arrays)
    one, _ = reader.restore({"count": arrays["count"]})[1:]
    assert same(one, {"count": arrays["count"]})


def test_newest_are_kept(tmp_path, arrays):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (2, 10, 11, 100, 101):
        checkpoints.save(step, arrays, {})
    assert checkpoints.steps() == [11, 100, 101]
    with pytest.raises(ValueError, match="keep=1 must be at least 2"):
        Checkpoints(tmp_path / "c", keep=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_what_is_not_finite_is_not_saved(tmp_path, arrays, rng, dtype, bad):
    checkpoints = Checkpoints(tmp_path / "c")
    name = f"{dtype}.value"
    broken = {**arrays, name: arrays[name].at[rng.integers(4), rng.integers(5)].set(bad)}
    with pytest.raises(ValueError, match=f"step 3: {name} is not finite"):
        checkpoints.save(3, broken, {})
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict[int, dict[str, jax.Array]]]:
    """A folder with checkpoints of steps 1 and 2, and their arrays."""
    folder = tmp_path_factory.mktemp("two") / "c"
    checkpoints, saved = Checkpoints(folder), {}
    for step in (1, 2):
        saved[step] = {dtype: draw(np.random.default_rng(step), dtype) for dtype in ("float32", "bfloat16", "int32")}
        checkpoints.save(step, saved[step], {"data": step})
    return folder, saved


def damage(file: Path, how: str, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    at = int(rng.integers(len(data)))
    if how == "deleted":
        file.unlink()
        return
    if how == "truncated":
        del data[at:]
    elif how == "flipped":
        data[at] ^= 1 << int(rng.integers(8))
    elif how == "zeroed":
        data[at:] = bytes(len(data) - at)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped", "zeroed", "deleted"])
def test_damage_is_noticed_or_harmless(tmp_path, two, rng, said, how):
    """Whichever file of the newest checkpoint is damaged: what is restored was saved, and saving goes on."""
    original, saved = two
    files = [file.relative_to(original) for file in sorted((original / "2").rglob("*")) if file.is_file()]
    noticed = []
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(original, run / "c")
        damage(run / "c" / file, how, rng)
        said.clear()
        before, checkpoints = tree(run), Checkpoints(run / "c")
        step, arrays, note = checkpoints.restore(saved[2])
        assert same(arrays, saved[step]) and note["data"] == step, file
        assert tree(run) == before, "restoring changed something"
        assert len(said) == (step == 1) and all("checkpoint of step 2 is damaged" in line for line in said), file
        if step == 1:
            noticed.append(file.name)
        if rng.random() < 0.3:
            checkpoints.save(3, saved[1], {"data": 3})
            assert Checkpoints(run / "c").restore(saved[1])[0] == 3
    assert "metadata" in noticed and len(noticed) > 1, noticed  # the note, and a file of the arrays


def test_damaged_checkpoint_makes_room(tmp_path, two, said):
    original, saved = two
    shutil.copytree(original, tmp_path / "c")
    (tmp_path / "c/2/note/metadata").write_text("{")
    damaged = tree(tmp_path / "c/2")
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.restore(saved[1])
    checkpoints.save(2, saved[2], {"data": 2})
    assert [path.read_bytes() for path in (tmp_path / "damaged/2").rglob("*") if path.is_file()] == list(
        damaged.values()
    )
    assert said[-1] == f"moved the damaged checkpoint of step 2 to {tmp_path}/damaged/2"
    step, arrays, _ = Checkpoints(tmp_path / "c").restore(saved[2])
    assert step == 2 and same(arrays, saved[2])


def test_changed_values_that_decode_are_caught_by_the_checksum(tmp_path, arrays, rng, said):
    """The arrays of step 2 are whole, but one bit of one of them is not that which was saved."""
    name = f"{rng.choice(['float32', 'int32', 'uint8', 'bfloat16'])}.value"
    changed = np.asarray(arrays[name]).copy()
    changed.view(np.uint8)[rng.integers(4), rng.integers(5)] ^= 1
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step, values in ((1, arrays), (2, {**arrays, name: jnp.asarray(changed)}), (3, arrays)):
        checkpoints.save(step, values, {})
    shutil.copy(tmp_path / "c/3/note/metadata", tmp_path / "c/2/note/metadata")
    shutil.rmtree(tmp_path / "c/3")
    step, restored, _ = Checkpoints(tmp_path / "c").restore(arrays)
    assert step == 1 and same(restored, arrays)
    assert f"the checksum of {name} is" in said[0]


def test_changed_note_is_caught_by_its_checksum(tmp_path, two):
    original, saved = two
    shutil.copytree(original, tmp_path / "c")
    file = tmp_path / "c/2/note/metadata"
    written = json.loads(file.read_text())
    written["note"]["data"] = 3
    file.write_text(json.dumps(written))
    assert Checkpoints(tmp_path / "c").restore(saved[2])[0] == 1


def test_nothing_is_lost_if_none_can_be_read(tmp_path, two, rng):
    original, saved = two
    shutil.copytree(original, tmp_path / "c")
    for step in (1, 2):
        damage(tmp_path / f"c/{step}/note/metadata", "truncated", rng)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints can be read; step 2: .") as caught:
        Checkpoints(tmp_path / "c").restore(saved[1])
    assert "\n" not in str(caught.value) and tree(tmp_path) == before


@pytest.mark.parametrize("wrong", ["name", "shape"])
def test_arrays_of_another_model_are_told_apart(two, wrong):
    folder, _ = two
    like = {"float32": jnp.zeros((5, 4))} if wrong == "shape" else {"another": jnp.zeros(3)}
    expected = r"float32 is float32 \(4, 5\), not float32 \(5, 4\)" if wrong == "shape" else "it has no array another"
    with pytest.raises(ValueError, match=expected):
        Checkpoints(folder).restore(like)


def test_leftovers_of_kills_are_in_nobodys_way(tmp_path, two, rng):
    """A save that was cut off in the middle, and a deletion of an old checkpoint that was."""
    original, saved = two
    shutil.copytree(original, tmp_path / "c")
    shutil.copytree(original / "2", tmp_path / "c/3.orbax-checkpoint-tmp")
    shutil.copytree(original / "1", tmp_path / "c/0")
    for folder in ("c/3.orbax-checkpoint-tmp", "c/0"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        for file in rng.choice(files, len(files) // 2, replace=False):
            file.unlink()
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.restore(saved[2])[0] == 2
    checkpoints.save(3, saved[1], {})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]
    assert Checkpoints(tmp_path / "c").restore(saved[1])[0] == 3


def test_folder_that_cannot_be_written_is_an_error(tmp_path, arrays):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(OSError, match=r"no checkpoint of step 1 could be written: ."):
        Checkpoints(tmp_path / "c").save(1, arrays, {})


def test_full_disk_leaves_the_checkpoints_before(tmp_path, two, monkeypatch):
    original, saved = two
    shutil.copytree(original, tmp_path / "c")
    before, checkpoints = tree(tmp_path), Checkpoints(tmp_path / "c")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OSError, match=r"no checkpoint of step 3 .*No space left on device.*1,048,576 bytes are free"):
        checkpoints.save(3, saved[1], {})
    monkeypatch.undo()
    assert tree(tmp_path) == before
    checkpoints.save(3, saved[1], {})
    assert checkpoints.steps() == [2, 3] and checkpoints.last == 3
