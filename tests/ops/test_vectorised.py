"""The CPU's loops are vector code for every instruction set: GCC says so of each that must be.

A loop that it leaves scalar gives the right numbers, ten times as slowly. Attention's are written
in vectors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Loops by a piece of their body, and how often each is compiled at least: inlined, once more.
LOOPS = {
    "geglu_loops.cpp": {"math::store(math::geglu(": 2, "math::geglu_gradients(": 2},
}


@pytest.fixture(scope="module")
def gcc() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or "Free Software Foundation" not in subprocess.getoutput(
        f"{found} --version"
    ):
        pytest.skip("GCC's own report and assembly are read")
    return found


def flags_of_the_build(file: str, isa: str) -> list[str]:
    """What CMakeLists.txt compiles this file with for an instruction set, in its release build."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    everywhere = re.search(r"^add_compile_options\((-Wall.*?)\)", text, re.M)
    assert everywhere
    flags = [*everywhere[1].split(), "-O3", "-std=c++17"]
    if file == "attention_loops.cpp":
        flags.append("-ffp-contract=fast")
    return flags + flags_of_the_set(isa, text)


def flags_of_the_set(isa: str, text: str) -> list[str]:
    named = re.search(rf"set\({isa}_flags (.*?)\)", text)
    if named is None:
        return []
    words = named[1].split()
    return [
        flag
        for word in words
        for flag in (
            flags_of_the_set(word[2 : -len("_flags}")], text) if word.startswith("${") else [word]
        )
    ]


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
@pytest.mark.parametrize("file", LOOPS)
def test_loops_are_vectorised(gcc: str, file: str, isa: str, tmp_path: Path) -> None:
    source = ROOT / "csrc" / "cpu" / file
    command = [gcc, *flags_of_the_build(file, isa), f"-DREWARDPROP_ISA={isa}", "-c", str(source)]
    command += ["-fopt-info-vec-optimized", "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    vectorised = [
        int(line)
        for line in re.findall(rf"{file}:(\d+):\d+: optimized: loop vectorized", done.stderr)
    ]
    lines = source.read_text(encoding="utf-8").splitlines()
    for body, least in LOOPS[file].items():
        numbers = [number for number, line in enumerate(lines, 1) if body in line]
        assert len(numbers) == 1, body
        # GCC names the line of the loop's head: its body's, or one or two above it.
        found = [line for line in vectorised if 0 <= numbers[0] - line <= 3]
        assert len(found) >= least, f"{body} is scalar code\n{done.stderr}"


def loops_of_attention(gcc: str, isa: str, folder: Path) -> list[str]:
    """The assembly between one label and the next."""
    flags = flags_of_the_build("attention_loops.cpp", isa)
    source = ROOT / "csrc" / "cpu" / "attention_loops.cpp"
    command = [gcc, *flags, f"-DREWARDPROP_ISA={isa}", "-S", str(source)]
    subprocess.run([*command, "-o", str(folder / "out.s")], check=True, timeout=300)
    assembly = (folder / "out.s").read_text(encoding="utf-8")
    return re.split(r"^\.L\d+:$", assembly, flags=re.M)


def test_bfloat16_attention_is_made_of_the_instruction_for_it(gcc: str, tmp_path: Path) -> None:
    """A whole tile of sums in registers: 24 products in a row, nothing stored between them."""
    loops = loops_of_attention(gcc, "avx512_bf16", tmp_path)
    tiles = [loop for loop in loops if loop.count("vdpbf16ps") == 24]
    assert tiles
    for tile in tiles:
        between = tile[tile.index("vdpbf16ps") : tile.rindex("vdpbf16ps")]
        assert not re.search(r"(rsp|rbp)", between), tile


def test_bfloat16_attention_is_made_of_tiles_where_there_are_some(gcc: str, tmp_path: Path) -> None:
    """Four products for four loads, and nothing stored between them."""
    loops = loops_of_attention(gcc, "amx", tmp_path)
    tiles = [loop for loop in loops if loop.count("tdpbf16ps") == 4]
    assert tiles
    for tile in tiles:
        inside = tile[: tile.rindex("tdpbf16ps")]
        assert inside.count("tileloadd") == 4, tile
        assert "tilestored" not in inside, tile
