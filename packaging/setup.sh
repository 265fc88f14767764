#!/usr/bin/env bash
# Prepares a checkout: system packages, then .venv with udf in it.
#
#   packaging/setup.sh run    what `udf` itself needs (make setup, make demo)
#   packaging/setup.sh test   also the foreign FUSE programs and tools of the tests and benchmarks
#
# Only what is missing is installed, and nothing is asked from the network when nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian package : how to see that it, or its like from elsewhere, is there.
RUN_PACKAGES=(
  'fuse3            : command -v fusermount3'
  'gcc              : command -v gcc'
  'libc6-dev        : test -e /usr/include/stdlib.h'
  'pkg-config       : command -v pkg-config'
  'libfuse3-dev     : pkg-config --exists fuse3'
  'dosfstools       : command -v mkfs.fat || test -x /sbin/mkfs.fat'  # make demo, which shows what others say of a stick
  'mtools           : command -v mcopy'  # likewise
  'python3-venv     : "$PYTHON" -c "import ensurepip, venv"'
  'python3-dev      : test -e "$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path(\"include\"))")/Python.h"'
)
TEST_PACKAGES=(
  'squashfuse       : command -v squashfuse_ll'
  'squashfs-tools   : command -v mksquashfs'
  'sshfs            : command -v sshfs'
  'openssh-server   : test -x /usr/sbin/sshd'
  'openssh-client   : command -v ssh-keygen'
  'bindfs           : command -v bindfs'
  'fuse-overlayfs   : command -v fuse-overlayfs'
  'fuse-zip         : command -v fuse-zip'
  'zip              : command -v zip'
  'fuseiso          : command -v fuseiso'
  'genisoimage      : command -v genisoimage'
  'fuse2fs          : command -v fuse2fs'
  'e2fsprogs        : test -x /sbin/mkfs.ext4'
  'acl              : command -v setfacl'
  'attr             : command -v setfattr'
  'git              : command -v git'
  'procps           : command -v ps'
  'systemd          : command -v systemd-analyze'
  'libnbd-bin       : command -v nbdcopy'
  'nbdkit           : command -v nbdkit'
  'qemu-utils       : command -v qemu-nbd'
  'fio              : command -v fio'
  'usbip            : command -v usbip || test -x /usr/sbin/usbip'
  'erofs-utils      : command -v mkfs.erofs'
  'fusefat          : command -v fusefat'  # make bench stick: another one that knows FAT
  'fdisk            : command -v sfdisk || test -x /sbin/sfdisk'
)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# The first interpreter that is new enough; Debian's own when the one in front on PATH is too old.
find_python() {
  local candidate
  for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    die "run this as root, or install sudo: $*"
  fi
}

lacking() {
  local row
  for row in "$@"; do
    # Read back from the row only: every check above is written in this file.
    if ! eval "${row#*:}" >/dev/null 2>&1; then printf '%s\n' "${row%%:*}" | tr -d ' '; fi
  done
}

install_packages() {
  local missing
  mapfile -t missing < <(lacking "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "these are missing, install them with your package manager: ${missing[*]}"
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c '
    apt-get install -y -q --no-install-recommends "$@" ||
      { apt-get update -q && apt-get install -y -q --no-install-recommends "$@"; }' sh "${missing[@]}" >&2 </dev/null ||
    die "apt-get could not install: ${missing[*]}"
  mapfile -t missing < <(lacking "$@")
  [ ${#missing[@]} -eq 0 ] || die "still missing after apt-get: ${missing[*]}"
}

build_environment() {
  local stamp=.venv/.udf-setup want
  want=$("$PYTHON" -c 'import sys; print(sys.executable, sys.version)'; pwd; sha256sum <pyproject.toml)
  if [ -x .venv/bin/udf ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && .venv/bin/python -c 'import pyfuse3'; then
    return
  fi
  say "building .venv with $PYTHON"
  [ -x .venv/bin/python ] && [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(head -n 1 <<<"$want")" ] || rm -rf .venv
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' >&2 </dev/null
  printf '%s\n' "$want" >"$stamp"
}

[ "${BASH_VERSINFO[0]}" -ge 4 ] || die "bash 4 or newer is needed"
wanted=${1:-run}
if ! PYTHON=$(find_python); then
  command -v apt-get >/dev/null || die "Python 3.11 or newer is needed"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get update -q && apt-get install -y -q python3' >&2 </dev/null
  PYTHON=$(find_python) || die "Python 3.11 or newer is needed, and this system's packages have none"
fi
case $wanted in
  run) install_packages "${RUN_PACKAGES[@]}" ;;
  test) install_packages "${RUN_PACKAGES[@]}" "${TEST_PACKAGES[@]}" ;;
  *) die "say run or test" ;;
esac
build_environment
