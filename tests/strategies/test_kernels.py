import logging
import math
import os
import re
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import (
    Int4Compressor,
    Int8Compressor,
    SignCompressor,
    TopKCompressor,
)
from danon_lightning.strategies.communication.compressors.base import Context
from danon_lightning.strategies.communication.kernels import build, loading

CODECS = {
    "int8": Int8Compressor(),
    "int8, blocks of 12": Int8Compressor(12),
    "int8, blocks of 1024": Int8Compressor(1024),
    "int8, stochastic": Int8Compressor(stochastic=True),
    "int4": Int4Compressor(),
    "int4, blocks of 8": Int4Compressor(8),
    "int4, blocks of 520": Int4Compressor(520),
    "int4, stochastic": Int4Compressor(stochastic=True),
    "sign": SignCompressor(),
    "sign, blocks of 32": SignCompressor(32),
    "topk": TopKCompressor(),
    "topk 30 %": TopKCompressor(0.3),
    "topk 100 %": TopKCompressor(1.0),
}
SIZES = [1, 2, 7, 15, 31, 33, 63, 64, 65, 255, 256, 257, 1023, 2049, 5000, 70_001]


@contextmanager
def eager():
    """In here, eager torch does the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "library", lambda: None)
        yield


def both(function):
    """What the kernels give, and what eager torch gives."""
    if not kernels.available():
        pytest.skip("the kernels cannot be built here")
    compiled = function()
    with eager():
        assert not kernels.available()
        return compiled, function()


def assert_same_bits(a, b):
    """Of float32 tensors; a NaN is a NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32))


def tensor_of(kind, numel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    if kind == "heavy-tailed":
        values = values / torch.rand(numel, generator=generator)
    elif kind == "all scales":
        values = values * 10.0 ** torch.randint(-44, 38, (numel,), generator=generator)
    elif kind == "ties":
        values = torch.randint(-3, 4, (numel,), generator=generator) / 2
    elif kind == "zeros of both signs":
        values = torch.where(values > 0, 0.0, -0.0)
    elif kind == "subnormal":
        values = values * 1e-41
    elif kind == "zeros of both signs among others":
        values = torch.where(values.abs() < 1, values * 0, values)
    elif kind == "halves of a step":  # rounding to even decides
        values = torch.randint(-254, 255, (numel,), generator=generator) / 2
    elif kind in ("nan", "inf"):
        values[torch.rand(numel, generator=generator) < 2 / numel] = math.nan if kind == "nan" else -math.inf
    return values


KINDS = [
    *("normal", "heavy-tailed", "all scales", "ties", "subnormal", "halves of a step", "nan", "inf"),
    *("zeros of both signs", "zeros of both signs among others"),
]


# ---- equal to the bit


def transcript(codec, values, residual, decay, step):
    """All that a codec can be asked, in one list of tensors."""
    numel, results = values.numel(), []
    state = {}
    for feedback in (False, True, True):  # the third with the second's threshold
        context = Context(step=step, seed=5, state=state)
        payload = torch.full((codec.payload_bytes(numel, step),), 0xAA, dtype=torch.uint8)
        if feedback:
            new_residual = torch.full_like(values, 7.0)
            codec.encode_with_feedback(values, residual, decay, new_residual, payload, context)
            results.append(new_residual)
        else:
            codec.encode(values, payload, context)
        state = context.new_state
        out, onto = torch.full_like(values, 7.0), values.clone()
        codec.decode(payload, out)
        codec.decode(payload, onto, add=True)
        results += [payload, out, onto, torch.tensor(list(state.values()), dtype=torch.float64)]
    for terms in ([values], [values, residual], [values, residual, values]):
        payload = torch.full((codec.payload_bytes(numel, step),), 0xAA, dtype=torch.uint8)
        finite = codec.encode_sum(terms, 0.3, payload, Context(step=step, seed=5))
        results += [payload, torch.tensor(finite)]
    return results


def assert_same_transcript(codec, values, residual, decay, step=0):
    for a, b in zip(*both(lambda: transcript(codec, values, residual, decay, step)), strict=True):
        if a.dtype == torch.float32:
            assert_same_bits(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_codecs_give_the_same_bits(codec, kind):
    for index, numel in enumerate(SIZES):
        values, residual = tensor_of(kind, numel), tensor_of("normal", numel, seed=1) * 0.1
        assert_same_transcript(CODECS[codec], values, residual, 0.9, step=index)
        assert_same_transcript(CODECS[codec], values, -torch.zeros(numel), 1.0, step=index)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codecs_give_the_same_bits_on_any_floats(codec, data):
    numbers = st.floats(width=32)
    values = data.draw(st.lists(numbers, min_size=1, max_size=90))
    residual = data.draw(st.lists(numbers, min_size=len(values), max_size=len(values)))
    decay = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    assert_same_transcript(CODECS[codec], torch.tensor(values), torch.tensor(residual), decay)


@pytest.mark.parametrize("codec", CODECS)
def test_views_at_any_address_give_the_same_bits(codec):
    """Regions begin anywhere in a bucket, payloads at multiples of 8 bytes."""
    memory, residuals = tensor_of("normal", 1100), tensor_of("normal", 1100, seed=1)
    for start in (1, 3, 13):
        values, residual = memory[start : start + 1001], residuals[start + 1 : start + 1002]
        assert_same_transcript(CODECS[codec], values, residual, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_give_the_same_bits(kind, in_place, count):
    for numel in SIZES:
        sources = [tensor_of(kind if i == 0 else "normal", numel, seed=i) for i in range(count)]

        def run(sources=sources, numel=numel):
            copies = [source.clone() for source in sources]
            out = copies[0] if in_place else torch.full((numel,), 7.0)
            return out, kernels.add_scaled(out, copies, 1 / 3), copies[1:]

        (a, finite, rest), (b, finite_too, _) = both(run)
        assert_same_bits(a, b)
        assert finite is finite_too
        assert finite == bool(torch.isfinite(a).all())
        for copy, source in zip(rest, sources[1:], strict=True):
            assert_same_bits(copy, source)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("numel", SIZES)
def test_copies_give_the_same_bits_and_nothing_more(numel, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(loading, "library", lambda: None)
    source = tensor_of("normal", numel + 20)
    for start in (0, 1, 5, 8, 13):  # at any address
        out = torch.full((numel + 20,), 7.0)
        kernels.copy(out[start : start + numel], source[3 : 3 + numel])
        assert torch.equal(out[start : start + numel], source[3 : 3 + numel])
        assert (out[:start] == 7).all() and (out[start + numel :] == 7).all()


def test_copies_take_other_types_and_strides():
    out = torch.empty(50, dtype=torch.float64)
    kernels.copy(out, torch.arange(100.0)[::2])
    assert out.tolist() == list(range(0, 100, 2))


# ---- sums


@pytest.mark.parametrize("compiled", [True, False])
def test_sums_are_scaled_and_tested(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(loading, "library", lambda: None)
    out = torch.empty(3000)
    a, b = tensor_of("normal", 3000), tensor_of("normal", 3000, seed=1)
    assert kernels.add_scaled(out, [a, b], 0.25) is True
    torch.testing.assert_close(out, (a + b) / 4)
    for place in (0, 1500, 2999):
        for bad in (math.nan, math.inf, -math.inf):
            spoilt = a.clone()
            spoilt[place] = bad
            assert kernels.add_scaled(out, [b, spoilt], 0.25) is False
    # Overflow of the sum counts, though every source is finite.
    assert kernels.add_scaled(torch.empty(4), [torch.full((4,), 3e38)] * 2, 0.25) is False
    # That of all elements does not.
    assert kernels.add_scaled(out, [torch.full((3000,), 3e38)], 1.0) is True
    assert kernels.add_scaled(torch.empty(0), [torch.empty(0)], 1.0) is True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_sums_take_other_types(dtype):
    out, source = torch.empty(100), tensor_of("normal", 100).to(dtype)
    assert kernels.add_scaled(out, [source, source], 0.5) is True
    torch.testing.assert_close(out, source.float())


def test_sums_take_strided_tensors():
    out, source = torch.empty(100), tensor_of("normal", 200)[::2]
    assert kernels.add_scaled(out, [source], 2.0) is True
    assert torch.equal(out, 2 * source)


@pytest.mark.cuda
def test_sums_on_a_device_do_not_wait():
    out, source = torch.empty(100, device="cuda"), torch.ones(100, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        finite = kernels.add_scaled(out, [source, source], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finite.shape == () and bool(finite)
    assert torch.equal(out, source)


# ---- building and loading


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DANON_KERNELS", raising=False)
    # What is built is not run: this takes a tenth of the time.
    monkeypatch.setattr(build, "FLAGS", ("-O0", "-std=c++17", "-shared", "-fPIC"))
    return tmp_path / "danon_lightning" / "kernels"


@pytest.fixture
def compiles(monkeypatch):
    """The compilations that took place."""
    calls, compile_ = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *arguments: (calls.append(arguments), compile_(*arguments)))
    return calls


@pytest.fixture
def compiler():
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def load():
    """As in a new process."""
    return loading._Loader()()


@pytest.mark.slow
def test_importing_builds_nothing(cache):
    code = "import danon_lightning.strategies.communication.kernels"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "XDG_CACHE_HOME": str(cache.parents[1])}
    )
    assert not cache.exists()


def test_the_library_is_built_once(cache, compiles, compiler):
    assert load() is not None
    assert load() is not None
    assert len(compiles) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_other_flags_make_another_library(cache, compiles, compiler, monkeypatch):
    load()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g0"))
    load()
    assert len(compiles) == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DANON_KERNELS": "0"}, "DANON_KERNELS=0"),
        ({"PATH": ""}, "no C\\+\\+ compiler found"),
        ({"CXX": "/nowhere/c++"}, "no C\\+\\+ compiler found \\(/nowhere/c\\+\\+\\)"),
        ({"CXX": "false"}, "false --version failed with 1"),
    ],
)
def test_without_a_compiler_torch_does_it(cache, compiles, monkeypatch, caplog, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    loader = loading._Loader()
    with caplog.at_level(logging.INFO):
        assert loader() is None
        assert loader() is None
    assert len(caplog.records) == 1  # said once
    assert caplog.records[0].levelno == (logging.INFO if "DANON_KERNELS" in environment else logging.WARNING)
    assert "eager torch" in caplog.text
    assert re.search(message, caplog.text)
    assert not compiles
    monkeypatch.setattr(loading, "library", loader)
    assert not kernels.available()
    assert kernels.add_scaled(torch.empty(3), [torch.ones(3)], 1.0) is True


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache, compiler, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is not C++")
    monkeypatch.setattr(build, "SOURCE", broken)
    assert load() is None
    assert "error" in caplog.text
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_folder_of_somebody_else_is_not_used(cache, compiler, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    assert build.cache_directory() == cache
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert build.cache_directory() is None


@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_others_can_write_to_is_not_used(cache, compiler, caplog, which):
    cache.mkdir(parents=True, mode=0o700)
    (cache if which == "folder" else cache.parent).chmod(0o777)
    assert build.cache_directory() is None
    # The kernels are built in private then, and leave nothing behind.
    with build.built_library() as path:
        assert not path.is_relative_to(cache.parent)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()
    assert load() is not None
    assert not list(cache.iterdir())
    assert "not kept" in caplog.text


def test_a_link_in_place_of_the_folder_is_not_used(cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(elsewhere)
    assert build.cache_directory() is None


def test_a_library_others_can_write_to_is_not_loaded(cache, compiler, caplog):
    assert load() is not None
    library = next(cache.glob("*.so"))
    library.chmod(0o777)
    assert load() is None
    assert f"{library} does not belong to this user alone" in caplog.text


def test_a_home_that_cannot_be_written_is_no_obstacle(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.cache_directory() is None
    assert load() is not None


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    """As the XDG specification says; else each working directory had one."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert build.cache_directory() == tmp_path / ".cache" / "danon_lightning" / "kernels"


@pytest.mark.slow
def test_several_processes_build_once_between_them(cache, compiler, tmp_path):
    log = tmp_path / "compilations"
    wrapper = tmp_path / "counting-c++"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo x >> {log} ;; esac\nexec {compiler[0]} "$@"\n')
    wrapper.chmod(0o755)
    code = "from danon_lightning.strategies.communication import kernels; raise SystemExit(not kernels.available())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parents[1]), "CXX": str(wrapper)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait(timeout=200) for process in processes] == [0] * 4
    assert log.read_text() == "x\n"
    assert len(list(cache.glob("*.so"))) == 1


def test_the_source_lies_in_the_package():
    """It has to be where the wheel has it."""
    assert build.SOURCE == Path(build.__file__).parent / "kernels.cpp"
    assert build.SOURCE.is_file()
