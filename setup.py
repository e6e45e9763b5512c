# SPDX-License-Identifier: Apache-2.0
"""Builds the two extensions with the compilers that are there.

    _core   the C core and the Python objects around it; serves Python 3.11 and later
    _ops    shard and gather kernels behind LibTorch's stable ABI; serves torch 2.10 and later

Neither CUDA nor a GPU is needed. torch's own build helpers are not used: they want the very
compiler that torch was built with, and CUDA where torch has it. What is missing is said in one
sentence. AUTOTP_WERROR=1 turns compiler warnings into errors.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"]
FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
C_FLAGS = ["-std=c11", "-Wstrict-prototypes"]
CXX_FLAGS = ["-std=c++17"]

TORCH_OLDEST = (2, 10)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def missing(what: str, how: str) -> PlatformError:
    return PlatformError(f"deepspeed-autotp needs {what} to build: {how}")


def packages(debian: str, fedora: str) -> str:
    return f"apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora)"


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for end in endings for path in Path(folder).glob(f"*{end}"))


def torch_folder() -> Path:
    """Where torch lies; found without importing it, which takes seconds."""
    spec = find_spec("torch")
    how = "pip install 'torch>=2.10', then pip install --no-build-isolation ."
    if spec is None or spec.origin is None:
        raise missing("PyTorch 2.10 or later", how)
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < TORCH_OLDEST:
        raise missing("PyTorch 2.10 or later", f"torch is {found}; {how}")
    return Path(spec.origin).parent


class BuildExtensions(build_ext):
    """Compiles what is out of date, by the headers that each object was made from."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise PlatformError(f"deepspeed-autotp builds on Linux, not on {sys.platform}")
        super().run()

    def build_extensions(self) -> None:
        self.check_needs()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        flags, libraries = self.options_of(ext.name)
        objects = [self.compile_one(source, flags) for source in ext.sources]
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and target.exists() and not self.newer_than(target, objects):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
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
        return [*headers, TORCH_TARGET], [f"-L{torch / 'lib'}", "-ltorch_cpu"]

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

    def pcre2(self) -> str:
        """The static library, so that a wheel needs nothing; else the shared one."""
        name = "libpcre2-8.a"
        command = [*self.compiler.compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, text=True, capture_output=True).stdout.strip()
        return found if os.path.isabs(found) else "-lpcre2-8"


setup(
    ext_modules=[
        Extension(
            "deepspeed_autotp._core",
            sources("csrc/core", ".c") + sources("csrc/python", ".c"),
            py_limited_api=True,
        ),
        Extension(
            "deepspeed_autotp._ops",
            ["csrc/core/error.c", *sources("csrc/torch", ".c", ".cpp")],
            py_limited_api=True,
        ),
    ],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
