"""Names from outside: what may name a checkpoint, and what never becomes part of a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astuner.errors import RequestError
from astuner.service.names import check_name, checkpoint_path, parse_path

RUN = "0123456789abcdef0123456789abcdef:train:0"


@pytest.mark.parametrize("name", ["a", "step-000010", "final_v1.2", "0", "x" * 128])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "ä", "x" * 129, "a\0b"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_name(name)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tinker://",
        f"{RUN}/weights/a",
        f"tinker://{RUN}/weights",
        f"tinker://{RUN}/weights/a/b",
        f"tinker://{RUN}/weights/..",
        f"tinker://{RUN}/other/a",
        "tinker://../weights/a",
        "tinker://ABC:train:0/weights/a",
        f"tinker://{RUN}/../weights/a",
        f"file://{RUN}/weights/a",
    ],
)
def test_bad_paths(path: str) -> None:
    with pytest.raises(RequestError):
        parse_path(path)


def test_a_path_in_its_parts() -> None:
    path = parse_path(f"tinker://{RUN}/sampler_weights/step-1")
    assert (path.run_id, path.kind, path.name) == (RUN, "sampler_weights", "step-1")
    assert str(path) == f"tinker://{RUN}/sampler_weights/step-1"
    assert path.checkpoint_id == "sampler_weights/step-1"
    folder = path.folder(Path("/data"), "0f")
    assert folder == Path("/data") / RUN.replace(":", "_") / "sampler_weights" / "step-1@0f"


@given(st.text(), st.text(), st.text())
def test_whatever_is_accepted_stays_in_the_data_folder(run: str, kind: str, name: str) -> None:
    try:
        path = checkpoint_path(run, kind, name)
    except RequestError:
        return
    assert Path("/data") in path.folder(Path("/data"), "0f").resolve().parents


@given(st.from_regex(r"[.A-Za-z0-9/_-]{1,20}", fullmatch=True))
def test_names_alone_never_climb(name: str) -> None:
    try:
        path = checkpoint_path(RUN, "weights", name)
    except RequestError:
        return
    root = Path("/data") / RUN.replace(":", "_") / "weights"
    assert path.folder(Path("/data"), "0f").resolve().parent == root
