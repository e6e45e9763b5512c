# SPDX-License-Identifier: Apache-2.0
"""Builds the two extensions with the compilers that are there.

    _core   the C core and the Python objects around it; serves Python 3.11 and later
    _ops    shard and gather kernels behind LibTorch's stable ABI; serves torch 2.10 and later

and, where nvcc is found, libautotp_cuda.so, which _ops opens when it is first needed:

    AUTOTP_CUDA=auto|1|0        where nvcc can (the default: else a warning); or fail; never
    AUTOTP_CUDA_ARCHS=80,90     architectures to compile for; else all that a release has

Neither CUDA nor a GPU is needed. torch's own build helpers are not used: they want the very
compiler that torch was built with, and CUDA where torch has it. What is missing is said in one
sentence. AUTOTP_WERROR=1 turns compiler warnings into errors.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, PlatformError

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]
# Headers are named with their folder: "base/error.h" in the core, "core/base/error.h" elsewhere.
# As -iquote, since <torch/...> belongs to torch; nvcc, which sees no torch, takes -I.
FOLDERS = ["csrc", "csrc/core"]
INCLUDES = [f"-iquote{folder}" for folder in FOLDERS]
FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", *INCLUDES, *WARNINGS]
C_FLAGS = ["-std=c11", "-Wstrict-prototypes"]
CXX_FLAGS = ["-std=c++17"]

CUDA = "deepspeed_autotp.libautotp_cuda"
# Each runs on later ones of its generation as well (80 on 86 and 89, 100 on 103); of the last one
# the intermediate code goes in, too, for what comes after it.
CUDA_ARCHS = ("75", "80", "90", "100", "110", "120")
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    *(f"-I{folder}" for folder in FOLDERS),
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]
# A launch takes a table of 28 KB as its argument; before, 4 KB were the most.
NVCC_OLDEST = (12, 1)
# Not -Wpedantic: what nvcc hands to the host compiler is not pedantic itself.
CUDA_WARNINGS = ["-Xcompiler", "-Wall,-Wextra,-Wshadow,-Wconversion"]

TORCH_OLDEST = (2, 10)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def missing(what: str, how: str) -> PlatformError:
    return PlatformError(f"deepspeed-autotp needs {what} to build: {how}")


def packages(debian: str, fedora: str) -> str:
    return f"apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora)"


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for end in endings for path in Path(folder).rglob(f"*{end}"))


def torch_folder() -> Path:
    """Where torch is; found without importing it, which takes seconds."""
    spec = find_spec("torch")
    how = "pip install 'torch>=2.10,<2.14', then pip install --no-build-isolation ."
    if spec is None or spec.origin is None:
        raise missing("PyTorch 2.10 or later", how)
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < TORCH_OLDEST:
        raise missing("PyTorch 2.10 or later", f"torch is {found}; {how}")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def cuda_extensions() -> list[Extension]:
    """The CUDA library, unless it is not wanted or there is no compiler for it."""
    wanted = os.environ.get("AUTOTP_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise PlatformError(f"AUTOTP_CUDA is {wanted!r}, expected auto, 1 or 0")
    if wanted == "0" or (wanted == "auto" and find_nvcc() is None):
        return []
    return [Extension(CUDA, sources("csrc/cuda", ".cu"), optional=wanted == "auto")]


def said_by(nvcc: str, option: str) -> str:
    """What nvcc writes; nothing where it cannot be run."""
    try:
        return subprocess.run([nvcc, option], capture_output=True, text=True).stdout
    except OSError:
        return ""


def usable_nvcc() -> tuple[str, str]:
    """The nvcc to use and its version; an error where there is none, or one that is too old."""
    nvcc = find_nvcc()
    oldest = ".".join(map(str, NVCC_OLDEST))
    how = "put it in PATH or its folder in CUDA_HOME, or set AUTOTP_CUDA=auto"
    if nvcc is None:
        raise missing(f"nvcc {oldest} or later", how)
    found = re.search(r"release (\d+)\.(\d+)", said_by(nvcc, "--version"))
    if found is None or (int(found[1]), int(found[2])) < NVCC_OLDEST:
        version_found = f"{found[1]}.{found[2]}" if found else "of a version it does not say"
        raise missing(f"nvcc {oldest} or later", f"{nvcc} is {version_found}; {how}")
    return nvcc, f"{found[1]}.{found[2]}"


def cuda_archs(nvcc: str) -> list[str]:
    """What to compile for, by number; of a release, what this nvcc knows."""
    listed = said_by(nvcc, "--list-gpu-arch")
    known = [line.removeprefix("compute_") for line in listed.split()]
    asked = [arch for arch in os.environ.get("AUTOTP_CUDA_ARCHS", "").split(",") if arch]
    unknown = [arch for arch in asked if arch not in known]
    if unknown or not known:
        raise PlatformError(
            f"AUTOTP_CUDA_ARCHS: {nvcc} cannot compile for {', '.join(unknown) or 'anything'}; "
            f"expected some of {', '.join(known)}, separated by commas"
        )
    return asked or [arch for arch in CUDA_ARCHS if arch in known]


# Where Linux distributions have the licence, by Debian and by Fedora.
PCRE2_LICENCES = ("usr/share/doc/libpcre2-dev/copyright", "usr/share/licenses/pcre2*/*LICENCE*")


class BuildExtensions(build_ext):
    """Compiles what is out of date, by the headers that each object was made from."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise PlatformError(f"deepspeed-autotp builds on Linux, not on {sys.platform}")
        self.remove_cuda()
        super().run()

    def remove_cuda(self) -> None:
        """A library of an earlier build must not stand in for one that is not made now."""
        file = self.get_ext_filename(CUDA)
        for folder in (self.build_lib, *(["."] if self.inplace else [])):
            Path(folder, file).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        self.check_needs()
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        """The CUDA library is no Python module: its file has no tag of Python."""
        if CUDA.endswith(fullname):  # setuptools asks for the last part alone, too
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            self.try_cuda(ext)
            return
        flags, libraries = self.options_of(ext.name)
        objects = [self.compile_one(source, flags) for source in ext.sources]
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and target.exists() and not self.newer_than(target, objects):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if libraries[-1].endswith("libpcre2-8.a") and not self.inplace:
            self.copy_licence(target.parent)
        has_cxx = any(source.endswith(".cpp") for source in ext.sources)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=libraries,
            build_temp=self.build_temp,
            target_lang="c++" if has_cxx else "c",
        )

    def options_of(self, name: str) -> tuple[list[str], list[str]]:
        """Compiler flags and linker arguments of an extension."""
        if name.endswith("_core"):
            return [], ["-Wl,--exclude-libs,ALL", self.pcre2()]
        torch = torch_folder()
        include = torch / "include"
        headers = ["-isystem", str(include)]
        headers += ["-isystem", str(include / "torch" / "csrc" / "api" / "include")]
        return [*headers, TORCH_TARGET], [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lrt"]

    def compile_one(self, source: str, extension_flags: list[str]) -> str:
        """The object of a source file, compiled unless it is up to date."""
        (target,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        record = Path(target).with_suffix(".d")
        is_cxx = source.endswith(".cpp")
        if not self.force and self.is_current(Path(target), record):
            return target
        flags = [*FLAGS, *(CXX_FLAGS + extension_flags if is_cxx else C_FLAGS)]
        if os.environ.get("AUTOTP_WERROR") == "1":
            flags.append("-Werror")
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            extra_postargs=[*flags, "-MMD", "-MF", str(record)],
        )
        return target

    def try_cuda(self, ext: Extension) -> None:
        """Build the library. setuptools makes a warning of what fails of an optional one."""
        try:
            self.build_cuda(ext)
        except BaseError as error:
            if not ext.optional:
                raise
            raise PlatformError(
                f"{error}; the package works without this library, on a GPU more slowly; "
                "AUTOTP_CUDA=0 builds without it, AUTOTP_CUDA=1 fails where it cannot be built"
            ) from error

    def build_cuda(self, ext: Extension) -> None:
        """Compile what is out of date for the architectures that are asked for, and link."""
        nvcc, release = usable_nvcc()
        archs = cuda_archs(nvcc)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        # The objects for other architectures, and of another compiler, are others.
        folder = Path(self.build_temp) / "-".join(["cuda", release, *archs])
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*CUDA_FLAGS, *CUDA_WARNINGS, f'-DAUTOTP_ARCHS="{",".join(archs)}"', *codes]
        if os.environ.get("AUTOTP_WERROR") == "1":
            flags += ["-Werror", "all-warnings", "-Xcompiler", "-Werror"]
        objects = []
        for source in ext.sources:
            target = folder / (Path(source).stem + ".o")
            record = target.with_suffix(".d")
            objects.append(str(target))
            if self.force or not self.is_current(target, record):
                depends = ["-MMD", "-MF", str(record)]
                self.spawn([nvcc, *flags, *depends, "-c", source, "-o", str(target)])
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
        self.spawn([nvcc, *link, *objects, "-o", target])

    @classmethod
    def is_current(cls, target: Path, record: Path) -> bool:
        """Whether nothing is newer than `target` of what the compiler noted in `record`."""
        if not target.exists() or not record.exists():
            return False
        used = record.read_text().replace("\\\n", " ").split()[1:]
        return not cls.newer_than(target, [__file__, *used])

    @staticmethod
    def newer_than(target: Path, files: list[str]) -> bool:
        made = target.stat().st_mtime
        return any(not os.path.exists(name) or os.path.getmtime(name) > made for name in files)

    def preprocesses(self, language: str, text: str) -> bool:
        """Whether the compiler can read `text`, which shows that a header is there."""
        command = [*self.compiler.compiler, "-E", "-x", language, "-", "-o", os.devnull]
        command += [f"-I{folder}" for folder in self.compiler.include_dirs]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        return done.returncode == 0

    def check_needs(self) -> None:
        """Says in one sentence what is missing, before the first file is compiled."""
        compilers = packages("build-essential", "gcc gcc-c++")
        name = self.compiler.compiler[0]
        if shutil.which(name) is None or not self.preprocesses("c", ""):
            raise missing(f"a C compiler ({name})", compilers)
        if not self.preprocesses("c++", "#include <string>\n"):
            raise missing("a C++ compiler", compilers)
        if not self.preprocesses("c", "#include <Python.h>\n"):
            raise missing("Python's headers", packages("python3-dev", "python3-devel"))
        if not self.preprocesses("c", "#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>\n"):
            raise missing("the PCRE2 headers", packages("libpcre2-dev", "pcre2-devel"))
        torch_folder()
        self.check_nvcc()

    def check_nvcc(self) -> None:
        if any(ext.name == CUDA and not ext.optional for ext in self.extensions):
            cuda_archs(usable_nvcc()[0])

    def copy_licence(self, package: Path) -> None:
        """The licence of PCRE2 goes with a library that contains it."""
        for folder in PCRE2_LICENCES:
            for found in sorted(Path("/").glob(folder)):
                target = package / "licenses" / "PCRE2"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(found.read_bytes())
                return
        self.warn("the licence of PCRE2 is not found; a wheel that is given to others needs it")

    def pcre2(self) -> str:
        """The static library, so that a wheel needs nothing; else the shared one."""
        name = "libpcre2-8.a"
        command = [*self.compiler.compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, text=True, capture_output=True).stdout.strip()
        return found if os.path.isabs(found) else "-lpcre2-8"


class BuildCuda(BuildExtensions):
    """The CUDA library alone, which needs no torch and no headers of Python."""

    description = "compile the CUDA library alone"

    def finalize_options(self) -> None:
        super().finalize_options()
        self.extensions = [Extension(CUDA, sources("csrc/cuda", ".cu"))]

    def check_needs(self) -> None:
        self.check_nvcc()


def checked_cuda_extensions() -> list[Extension]:
    """The same; an error before setuptools runs has to be told here."""
    try:
        return cuda_extensions()
    except PlatformError as error:
        sys.exit(f"error: {error}")


setup(
    ext_modules=[
        Extension(
            "deepspeed_autotp._core",
            sources("csrc/core", ".c") + sources("csrc/python", ".c"),
            py_limited_api=True,
        ),
        Extension(
            "deepspeed_autotp._ops",
            [
                "csrc/core/base/error.c",
                *sources("csrc/shared_memory", ".c"),
                *sources("csrc/nccl", ".c"),
                *sources("csrc/files", ".c"),
                *sources("csrc/pack", ".c"),
                *sources("csrc/torch", ".c", ".cpp"),
            ],
            py_limited_api=True,
        ),
        *checked_cuda_extensions(),
    ],
    cmdclass={"build_ext": BuildExtensions, "build_cuda": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
