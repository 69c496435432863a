# shellcheck shell=bash
# Sourced by the scripts beside it: where things are, and what must be installed.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
arm=$PWD/build/arm
# shellcheck disable=SC2034 # for those who source this
python=$arm/sysroot/usr/bin/python-arm # CPython for aarch64, under qemu-user
qemu() { command -v qemu-aarch64 || command -v qemu-aarch64-static; }

# What cannot be done on this machine: one line that says why, and the status that left_out looks for.
give_up() {
  echo "aarch64 left out: $*" >&2
  exit 77
}
# left_out STATUS: end with the status of a script that failed; 2 if it gave up, or 0 if INSTANTFT_ARM=optional.
left_out() {
  [ "$1" = 77 ] || exit "$1"
  [ "${INSTANTFT_ARM:-}" = optional ] || exit 2
  exit 0
}

# Debian packages that are missing, on stdout.
missing_packages() {
  local packages=()
  command -v aarch64-linux-gnu-gcc >/dev/null || packages+=(gcc-aarch64-linux-gnu)
  command -v aarch64-linux-gnu-g++ >/dev/null || packages+=(g++-aarch64-linux-gnu)
  qemu >/dev/null || packages+=(qemu-user)
  "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
  echo "${packages[*]}"
}

# Install what is missing where that is possible, or give up.
need_packages() {
  local packages tool
  for tool in apt-get dpkg-deb "${PYTHON:-python3}"; do
    command -v "$tool" >/dev/null || give_up "it takes $tool, which is not here"
  done
  packages=$(missing_packages)
  [ -n "$packages" ] || return 0
  [ "$(id -u)" = 0 ] || give_up "missing packages; as root: apt-get install $packages"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update || true # one of several sources may be out of reach; what counts is the next line
  # shellcheck disable=SC2086 # a list
  apt-get -qq -y --no-install-recommends install $packages >/dev/null || give_up "apt-get install $packages failed"
  packages=$(missing_packages)
  [ -z "$packages" ] || give_up "apt-get installed $packages, and it is still missing"
}
