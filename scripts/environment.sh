# Sourced by run_all.sh and run_tests.sh: makes .venv (or uses the active conda environment) and sets PYTHON.
set -euo pipefail
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE # the pinned packages, and no others
export PYTHONNOUSERSITE=1
invoked_from=$PWD
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
ROOT=$PWD

fail() { echo "error: $*" >&2; exit 1; }

[[ $ROOT != *:* ]] || fail "$ROOT holds ':', which ends a folder's name in PATH and PYTHONPATH: move or rename it"

as_root() { # as_root COMMAND...: if this user may without being asked for a password
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

apt_install() { # apt_install PACKAGE: quietly, with a fresh package list if the old one does not do
  command -v apt-get >/dev/null || return 1
  echo "installing $1 with apt-get" >&2
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1")
  as_root "${install[@]}" >/dev/null 2>&1 || { as_root apt-get update -qq && as_root "${install[@]}"; } >/dev/null 2>&1
}

install_nginx() {
  apt_install nginx-light || return 1
  as_root systemctl disable --now nginx >/dev/null 2>&1 || true # the package starts a web server of its own
}

find_nginx() { command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || [ -x "${CONDA_PREFIX:-/nonexistent}/bin/nginx" ]; }
find_nginx || install_nginx ||
  fail "NGINX is missing and cannot be installed here: apt-get install nginx-light, or conda env create -f environment.yml"

if [ "${CONDA_DEFAULT_ENV:-}" = expert-router ]; then
  PYTHON=$CONDA_PREFIX/bin/python
else
  if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
    base=
    for candidate in python3.11 python3.12 python3 python; do
      if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
        base=$candidate; break
      fi
    done
    [ -n "$base" ] || fail "Python 3.11 or 3.12 is needed (3.13 has no numpy 1, which Triton's Python backend needs): apt-get install python3.11-venv libpython3.11 (or 3.12), or conda env create -f environment.yml"
    if ! "$base" -c 'import ensurepip' 2>/dev/null; then
      version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      apt_install "python$version-venv" || fail "Python's venv module is missing: apt-get install python$version-venv"
    fi
    "$base" -m venv --clear .venv
  fi
  PYTHON=$PWD/.venv/bin/python
fi

mkdir -p data/runs
exec 9>data/runs/install.lock
flock 9 # two scripts started together must not install into each other

stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/expert-router-installed
wanted=$(cat locks/torch-*.txt locks/workbench.txt scripts/install.py scripts/environment.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted $PWD" ]; then
  log=$PWD/data/runs/install.log
  echo "installing the locked packages into ${PYTHON%/bin/python} (about a minute and a half; log: ${log#"$PWD"/})" >&2
  # Written anew where it stood elsewhere before: activate and pyvenv.cfg name its place.
  [ "$PYTHON" != "$PWD/.venv/bin/python" ] || "$PYTHON" -m venv --without-pip .venv
  "$PYTHON" scripts/install.py torch workbench . >"$log" || exit 1
  echo "$wanted $PWD" >"$stamp"
fi

exec 9>&- # everything is installed

# The stub that Triton embeds links to libpython, which Debian's python3 does not bring along.
if ! "$PYTHON" -c 'from erlib.serving import wheel; wheel.preflight()' 2>/dev/null; then
  apt_install "libpython$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || true
  "$PYTHON" -c 'from erlib.serving import wheel; wheel.preflight()' 2>&1 | tail -n 1 | sed 's/^.*StartError: /error: /' >&2
  "$PYTHON" -c 'from erlib.serving import wheel; wheel.preflight()' 2>/dev/null || exit 1
fi

export PYTHON PATH="${PYTHON%/python}:$PATH:/usr/sbin"
export NNCF_CI=1 DO_NOT_TRACK=1 # no telemetry
cd "$invoked_from"
