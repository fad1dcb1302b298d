# Set-up shared by quickstart.sh and test.sh; sourced by them. `set_up` leaves a shell with the virtual environment
# on PATH, everything installed and the package built. Only what is missing or changed is done again.
#
# Environment: VIRTUAL_ENV (an active virtual environment is used; else .venv here), CXX, QTOOLKIT_CUDA, QTOOLKIT_JOBS.
# shellcheck shell=bash

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
SYSROOT="$ROOT/build/sysroot"  # headers and libraries unpacked from packages where we may not install them

say() { printf '==> %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# --- system packages ------------------------------------------------------------------------------------------------

# Runs a command as root; fails where that needs a password.
as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  else
    sudo -n "$@"
  fi
}
can_install() { have apt-get && { [[ $(id -u) == 0 ]] || { have sudo && sudo -n true 2>/dev/null; }; }; }

apt_install() {
  say "Installing $* (apt-get)"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Without the right to install: unpacks packages that are only headers and static libraries under build/sysroot.
apt_unpack() {
  have apt-get && have dpkg-deb || return 1
  say "Unpacking $* into build/sysroot (no right to install packages)"
  local state="$ROOT/build/apt"
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/debs" "$SYSROOT"
  local options=(-qq -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache")
  apt-get "${options[@]}" update || return 1
  (cd "$state/debs" && apt-get "${options[@]}" download "$@") || return 1
  local deb
  for deb in "$state"/debs/*.deb; do dpkg-deb -x "$deb" "$SYSROOT" || return 1; done
}

# --- Python ---------------------------------------------------------------------------------------------------------

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
python_can_make_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# Prints a Python >= 3.10; the second pass accepts one that cannot make a virtual environment yet.
find_python() {
  local name test
  for test in python_can_make_venv true; do
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
      if have "$name" && python_is_new_enough "$name" && "$test" "$name"; then
        command -v "$name"
        return
      fi
    done
  done
  return 1
}

make_venv() {
  local python
  if ! python=$(find_python); then
    { can_install && apt_install python3 python3-venv; } ||
      die "no Python >= 3.10 found. Install python3 and python3-venv."
    python=$(find_python) || die "this system's Python is older than 3.10. Install a newer one and put it on PATH."
  fi
  if ! python_can_make_venv "$python"; then
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    { can_install && apt_install "python$version-venv"; } ||
      die "$python cannot make a virtual environment. Install python$version-venv, or activate an environment."
  fi
  say "Making the virtual environment .venv with $("$python" --version)"
  "$python" -m venv "$ROOT/.venv"
}

use_venv() {
  if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
    say "Using the active virtual environment $VIRTUAL_ENV"
  else
    # A copied or half-made environment does not run: it is made again.
    "$ROOT/.venv/bin/python" -c '' 2>/dev/null || { rm -rf "$ROOT/.venv" && make_venv; }
    export VIRTUAL_ENV="$ROOT/.venv"
    say "Using the virtual environment $VIRTUAL_ENV"
  fi
  python_is_new_enough "$VIRTUAL_ENV/bin/python" || die "$VIRTUAL_ENV has a Python older than 3.10. Use another one."
  # First on PATH: its CMake is the one to use, the system's may be older than 3.26.
  export PATH="$VIRTUAL_ENV/bin:$PATH"
  unset PYTHONHOME
  hash -r
}

# --- compiler and C++ libraries -------------------------------------------------------------------------------------

# The PyTorch headers need C++20; the operators need GCC's OpenMP (CMakeLists.txt says why).
compiler_is_new_enough() {
  local macros
  macros=$(echo '__clang_major__ __GNUC__' | "$1" -x c++ -E -P - 2>/dev/null | tail -n 1) || return 1
  [[ $macros == __clang_major__\ * && ${macros##* } -ge 12 ]]  # Clang replaces the first word
}

find_compiler() {
  local name
  for name in ${CXX:-g++ g++-15 g++-14 g++-13 g++-12}; do
    if have "$name" && compiler_is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

use_compiler() {
  local package
  for package in g++ g++-12; do
    CXX=$(find_compiler) && break
    if can_install; then apt_install "$package" || true; fi
  done
  CXX=$(find_compiler) ||
    die "no GCC 12 or later found${CXX:+ in CXX=$CXX}. Install g++, or name one in CXX (Clang builds the kernels only)."
  export CXX
}

# Whether the compiler finds a header, with these options.
finds_header() {
  local header=$1
  shift
  echo "#include <$header>" | "$CXX" -x c++ -E "$@" - >/dev/null 2>&1
}

use_python_headers() {
  local version include
  read -r version include < <(python -c \
    'import sys, sysconfig; print("%d.%d" % sys.version_info[:2], sysconfig.get_path("include"))')
  finds_header Python.h "-I$include" && return
  local unpacked="$SYSROOT/usr/include/python$version"
  if [[ ! -f $unpacked/Python.h ]]; then
    if can_install; then
      apt_install "python$version-dev" && finds_header Python.h "-I$include" && return
    else
      apt_unpack "libpython$version-dev" || true
    fi
  fi
  [[ -f $unpacked/Python.h ]] || die "Python.h not found in $include. Install python$version-dev."
  export CPATH="$SYSROOT/usr/include${CPATH:+:$CPATH}"
  export CMAKE_ARGS="${CMAKE_ARGS:-} -DPython_INCLUDE_DIR=$unpacked"
}

use_googletest() {
  local unpacked="$SYSROOT/usr"
  if ! finds_header gtest/gtest.h && [[ ! -f $unpacked/include/gtest/gtest.h ]]; then
    if can_install; then
      apt_install libgtest-dev ccache || true
    else
      apt_unpack libgtest-dev || true
    fi
  fi
  if [[ -f $unpacked/include/gtest/gtest.h ]]; then
    export CMAKE_PREFIX_PATH="$unpacked${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}"
  else
    finds_header gtest/gtest.h || die "GoogleTest not found. Install libgtest-dev."
  fi
}

# --- Python packages and the build ----------------------------------------------------------------------------------

# Build requirements and extras of pyproject.toml and what setup.py adds, installed again only when that file changes.
install_requirements() {
  local stamp="$VIRTUAL_ENV/.qtoolkit-requirements" key
  key=$(cksum <"$ROOT/pyproject.toml")
  [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
  say "Installing PyTorch and the build tools with pip (a few GB and some minutes the first time)"
  python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null
  python -m pip install --quiet --upgrade pip
  local requirements
  mapfile -t requirements < <(
    python - "$ROOT/pyproject.toml" <<'PYTHON'
import importlib.metadata
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open(sys.argv[1], "rb") as file:
    config = tomllib.load(file)
extras = config["project"]["optional-dependencies"]
needed = {*config["build-system"]["requires"], "numpy", "tqdm", *extras["test"], *extras["examples"]}
try:  # a PyTorch that is there stays: torchvision then is the one that fits it
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) >= (2, 11):
        needed.add("torch==" + version)
except importlib.metadata.PackageNotFoundError:
    pass
print("\n".join(sorted(needed)))
PYTHON
  )
  python -m pip install --quiet "${requirements[@]}"
  echo "$key" >"$stamp"
}

build_package() {
  say "Building (only what changed)"
  if ! have nvcc && [[ -x /usr/local/cuda/bin/nvcc ]]; then export PATH="$PATH:/usr/local/cuda/bin"; fi
  cd "$ROOT" || die "cannot enter $ROOT"
  python setup.py --quiet build_ext --inplace
  local origin
  origin=$(cd / && python -c 'import importlib.util as u; s = u.find_spec("qtoolkit"); print(s.origin if s else "")')
  if [[ $origin != "$ROOT/python/"* ]]; then
    say "Installing the package into the environment (editable)"
    python -m pip install --quiet --no-build-isolation --no-deps -e .
  fi
}

# The CMake folder of this Python and PyTorch, named as in setup.py.
build_folder() {
  python -c 'import sys, importlib.metadata as m
print("build/%s-torch%s" % (sys.implementation.cache_tag, m.version("torch").split("+")[0]))'
}

set_up() {
  use_venv
  use_compiler
  use_python_headers
  if [[ ${QTOOLKIT_TESTS:-OFF} == ON ]]; then use_googletest; fi
  install_requirements
  build_package
}
