"""Stand-ins for the CUDA libraries that PyPI's PyTorch is linked with, so that it loads without them on a CPU.

    python cuda_stubs.py SITE_PACKAGES/torch/lib

The package index has no `+cpu` build of PyTorch. Its CUDA build needs 2.6 GB of NVIDIA packages only to be loaded; the
CPU image leaves those out and puts these libraries beside PyTorch's own, where its run path finds them. Each is made
for one missing soname and defines the symbols that the dynamic linker reports as unresolved. Every function returns
`cudaErrorNoDevice`, so PyTorch sees a machine without a GPU: `torch.cuda.is_available()` is False.

Needs `ldd`, `nm`, `readelf` and `gcc`. Where an index with `+cpu` wheels can be reached, use that instead: the
Dockerfile's TORCH_CPU_INDEX.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CUDA_ERROR_NO_DEVICE = 100  # cudaErrorNoDevice in driver_types.h, CUDA_ERROR_NO_DEVICE in cuda.h

Symbols = dict[str, str | None]  # name -> symbol version, None where the reference has none


def parse_ldd(text: str) -> tuple[list[str], set[str]]:
    """The missing sonames and the names of unresolved symbols in what `ldd -r` prints for one library."""
    missing = re.findall(r"^\s*(\S+) => not found$", text, re.MULTILINE)
    return list(dict.fromkeys(missing)), set(re.findall(r"^undefined symbol: ([^\s,]+)", text, re.MULTILINE))


def parse_nm(text: str) -> Symbols:
    """The symbols, with their versions, in what `nm --dynamic` prints."""
    words = (line.split()[-1] for line in text.splitlines() if line)
    return {name: version or None for name, _, version in (word.replace("@@", "@").partition("@") for word in words)}


def parse_version_needs(text: str) -> dict[str, str]:
    """Which soname each symbol version is expected in, from what `readelf -V` prints."""
    owners = {}
    for file, versions in re.findall(r"File: (\S+)((?:(?!File: ).)*)", text, re.DOTALL):
        owners.update({version: file for version in re.findall(r"Name: (\S+)", versions)})
    return owners


def assign(missing: list[str], symbols: Symbols, owners: dict[str, str], defined: set[str]) -> dict[str, Symbols]:
    """Divide one library's unresolved symbols among its missing sonames.

    A versioned symbol belongs to its version's owner; one without a version may be anywhere, and goes to the first.
    `defined` are symbols that PyTorch's own libraries bring at run time; Python's own come with the interpreter.
    """
    stubs: dict[str, Symbols] = {soname: {} for soname in missing}
    for name, version in symbols.items():
        if version is not None:
            stubs[owners[version]][name] = version
        elif name not in defined and not name.startswith(("Py", "_Py")):
            stubs[missing[0]][name] = None
    return stubs


def source(symbols: Symbols) -> str:
    """The C source of a stub library."""
    return "".join(f"int {name}(void) {{ return {CUDA_ERROR_NO_DEVICE}; }}\n" for name in sorted(symbols))


def version_script(symbols: Symbols) -> str:
    """The linker's version script: one node for each version, the rest unversioned."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for name, version in sorted(symbols.items()):
        if version is not None:
            nodes[version].append(name)
    return "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in nodes.items())


def _output(*command: str) -> str:
    # ldd ends with 1 where a library is missing, which is the very thing that is asked; it names symbols on stderr.
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def _unresolved(library: Path) -> tuple[list[str], Symbols]:
    """The library's missing sonames, and those of its own references that nothing resolves."""
    missing, names = parse_ldd(_output("ldd", "-r", str(library)))
    references = parse_nm(_output("nm", "--dynamic", "--undefined-only", str(library)))
    return missing, {name: version for name, version in references.items() if name in names}


def build(folder: Path) -> list[Path]:
    """Make the stubs that the libraries in `folder` need, and put them there."""
    libraries = sorted(path for path in folder.glob("*.so*") if path.is_file())
    if not libraries:
        raise SystemExit(f"cuda_stubs: no shared libraries in {folder}; give the path of torch/lib")
    defined: set[str] = set()
    for library in libraries:
        defined.update(parse_nm(_output("nm", "--dynamic", "--defined-only", str(library))))
    stubs: dict[str, Symbols] = defaultdict(dict)
    for library in libraries:
        owners = parse_version_needs(_output("readelf", "--version-info", "--wide", str(library)))
        for soname, symbols in assign(*_unresolved(library), owners, defined).items():
            stubs[soname].update(symbols)
    with tempfile.TemporaryDirectory() as work:
        return [_compile(soname, symbols, Path(work), folder) for soname, symbols in sorted(stubs.items())]


def _compile(soname: str, symbols: Symbols, work: Path, folder: Path) -> Path:
    c_file, script, output = work / "stub.c", work / "stub.map", folder / soname
    c_file.write_text(source(symbols))
    link = ["-shared", "-nostdlib", "-s", f"-Wl,-soname,{soname}"]
    if nodes := version_script(symbols):
        script.write_text(nodes)
        link.append(f"-Wl,--version-script={script}")
    # A name may be that of a compiler built-in; its own prototype would be an error.
    subprocess.run(["gcc", "-O1", "-fPIC", "-fno-builtin", *link, "-o", str(output), str(c_file)], check=True)
    return output


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: cuda_stubs.py TORCH_LIB_FOLDER")
    made = build(Path(sys.argv[1]))
    print(f"cuda_stubs: {len(made)} libraries: {', '.join(path.name for path in made)}")
