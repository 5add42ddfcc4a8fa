#!/bin/sh
# Finds or makes a Python environment for this project and prints the path of its Python.
#
#   sh demo/setup.sh         what the launchers need (they call it themselves)
#   sh demo/setup.sh serve   what serving needs, too
#   sh demo/setup.sh dev     what the tests need, too
#
# The active virtual or conda environment is used if it has what is needed, else .venv, which is made if need be.
# Repeated, this changes nothing and needs no network. All it has to say goes to standard error.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
extra=${1:-}
venv=$root/.venv
unfinished=$venv/unfinished # there from before an installation until it is complete

say() { printf 'setup: %s\n' "$*" >&2; }

lacks() { "$1" "$root/demo/setup/lacks.py" "$extra" 2>/dev/null || echo 'a working Python 3.11 or newer'; }

ready() { [ -x "$venv/bin/python" ] && [ ! -e "$unfinished" ] && [ -z "$(lacks "$venv/bin/python")" ]; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the name of the first Python that will do. A name on the PATH may be a shim with nothing behind it: try each.
find_python() {
    bare='' old=''
    for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! new_enough "$name"; then
            old=$version
        elif ! "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            bare=$version
        else
            echo "$name"
            return
        fi
    done
    if [ -n "$bare" ]; then
        say "Python $bare has no venv module; on Debian and Ubuntu: apt install python$bare-venv"
    elif [ -n "$old" ]; then
        say "Python $old is too old; install Python 3.11 or newer"
    else
        say "there is no Python here; install Python 3.11 or newer"
    fi
    return 1
}

# Waits until no other launcher installs. The lock lies on file descriptor 9 and goes with those who hold that open.
lock() {
    exec 9>"$root/.venv.lock"
    "$1" -c '
import fcntl, sys
try:
    fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: another launcher is installing; waiting for it", file=sys.stderr)
    fcntl.flock(0, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks
' <&9
}

# pip install with Python $1 and further arguments, from the folder of the project.
install() {
    python=$1
    shift
    [ -t 2 ] || set -- --quiet "$@" # progress is for a terminal
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2
    (cd "$root" && "$python" -m pip --disable-pip-version-check --no-input install "$@" >&2) || {
        say "pip could not install the project into ${python%/bin/python}; its reason stands above"
        return 1
    }
}

for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    python=$active/bin/python
    if [ -z "$active" ] || [ "$active" = "$venv" ] || [ ! -x "$python" ]; then continue; fi
    missing=$(lacks "$python")
    if [ "$missing" = rwkv-speech ]; then
        say "installing the project into the active environment $active, which has all that it needs"
        lock "$python"
        install "$python" --no-deps -e .
        missing=$(lacks "$python")
    fi
    if [ -z "$missing" ]; then
        printf '%s\n' "$python"
        exit
    fi
    if [ "${CONDA_DEFAULT_ENV:-}" != base ] || [ "$active" != "${CONDA_PREFIX:-}" ]; then
        say "the active environment $active lacks $missing; taking $venv instead"
    fi
done

base=''
if ! ready; then
    base=$(find_python)
    lock "$base"
fi
if [ -n "$base" ] && ! ready; then # nor has another launcher done it meanwhile
    updated=1
    if [ -e "$unfinished" ] || ! new_enough "$venv/bin/python"; then
        updated='' # what an interrupted pip leaves can look complete to pip
        [ ! -e "$venv" ] || say "$venv is unfinished or not usable; starting it over"
        rm -rf "$venv"
        mkdir "$venv"
        : >"$unfinished"
        "$base" -m venv "$venv" >&2
    fi
    : >"$unfinished"
    say "installing into $venv; with PyTorch's CUDA libraries that is" \
        "3 GB to download and 7 GB on disk, and takes some minutes"
    install "$venv/bin/python" -e ".${extra:+[$extra]}" || {
        [ -z "$updated" ] || rm "$unfinished" # pip left the environment as it was
        exit 1
    }
    rm "$unfinished"
    missing=$(lacks "$venv/bin/python")
    if [ -n "$missing" ]; then
        say "$venv is installed but lacks $missing"
        exit 1
    fi
    say "done"
fi
printf '%s\n' "$venv/bin/python"
