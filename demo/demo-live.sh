#!/bin/sh
# Writes what is said while it is said: of the microphone (after `pip install sounddevice`), of a file, or of samples
# that another program pipes in. In a terminal, what may still change is faint.
#
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth sh demo/demo-live.sh
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth realtime=1 sh demo/demo-live.sh talk.flac
#   ffmpeg -i https://... -f s16le -ar 16000 -ac 1 - | load_model=... format=json sh demo/demo-live.sh -
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}; so
# can any other that `sh demo/demo-live.sh --help` lists. Empty: the program decides, and says what it chose. Write
# $HOME for ~. Arguments of this script are a file, then flags of train.py if any; they win over both.
set -a # train.py takes its settings from the environment

file_path="${file_path:-}"                   # an audio file; -: 16-bit samples at 16 kHz; empty: the microphone
load_model="${load_model:-}"                 # the RWKV weights that the mission was trained with
adapter="${adapter:-}"                       # mission file; empty: the best of the newest run in proj_dir
mission="${mission:-}"                       # which, where there are files of several
proj_dir="${proj_dir:-}"                     # where training left its mission files; empty: output/ of this project

# The encoder and the adapter's shape that the mission was trained with; the .json beside a mission file tells them, and
# without one they are taken from here.
encoder="${encoder:-}"                       # empty: what the .json says, else microsoft/wavlm-large
downsample_k="${downsample_k:-}"             # empty: what the .json says, else 5
adapter_hidden="${adapter_hidden:-}"

step_s="${step_s:-0.32}"                     # seconds from one text to the next
right_s="${right_s:-0.32}"                   # seconds that the encoder hears ahead: later text, with fewer errors
left_s="${left_s:-}"                         # seconds that it hears again; empty: as many as its kind needs
pause_s="${pause_s:-0.5}"                    # seconds of silence that make text final
max_audio_s="${max_audio_s:-}"               # longest piece without a pause; empty: the longest that was trained on, or 30
realtime="${realtime:-}"                     # 1: a file no faster than it was spoken
format="${format:-text}"                     # text; json, a line for all that is shown

beam="${beam:-1}"                            # beams of final text; 1 is greedy
accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # which GPU, as in 1,; empty: the first
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU
quant="${quant:-}"                           # int8 or nf4: the language model in less memory; empty: as the mission file says

# --- nothing to edit below ---
set +a
. "$(dirname -- "$0")/setup/launch.sh"
case "${1:-}" in
'' | --*) ;;
*) set -- --file_path "$@" ;;
esac
launch live "$@"
