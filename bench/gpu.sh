#!/bin/sh
# All that only a GPU can show, in one go: is it right, how fast is it, what takes the time. docs/gpu.md tells the rest.
#
#   sh bench/gpu.sh                                on a machine with one NVIDIA GPU and PyTorch; at most 9 minutes
#   sh bench/gpu.sh --wheels FOLDER --out FOLDER   packages that the machine lacks; where the results go
#   sh bench/gpu.sh --dry                          every part in tiny sizes on a CPU
#
# In the environment: python=FILE, which must have torch (else python3); program=FOLDER, the tree to measure (else this).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
exec "${python:-python3}" "$root/bench/gpu/drive.py" --program "${program:-$root}" "$@"
