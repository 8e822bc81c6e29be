"""The compiled core under AddressSanitizer and UndefinedBehaviorSanitizer: ``fuzz_native.cpp`` says with what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"
# No optimisation: building takes longer than running does.
FLAGS = ["-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
VARIANTS = {"generic": []}  # as CMakeLists.txt builds them
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer and the core, built with sanitizers."""
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("sanitized")
    if compiler is None:
        pytest.skip("there is no g++ to build the core with sanitizers")
    jobs = {path.stem: [path] for path in (HERE / "fuzz_native.cpp", NATIVE / "rans.cpp", NATIVE / "machine.cpp")}
    for name, flags in VARIANTS.items():
        for source in ("trellis", "rans_decode"):
            jobs[f"{source}-{name}"] = [NATIVE / f"{source}.cpp", f"-DTENPAK_ISA={name}", *flags]

    def run(*arguments: str | Path) -> None:
        built = subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True)
        if built.returncode and "san" in built.stderr and "cannot find" in built.stderr:
            pytest.skip("g++ comes without the sanitizers' libraries")
        assert built.returncode == 0, built.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: run("-c", *jobs[name], "-I", NATIVE, "-o", folder / f"{name}.o"), jobs))
    run(*folder.glob("*.o"), "-o", folder / "fuzz")
    return folder / "fuzz"


def test_damaged_streams_and_odd_weights_do_no_harm(program: Path) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # that needs rights which containers may lack
    ran = subprocess.run([program, "400", "1"], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
