#!/bin/sh
# Talks in the terminal: what you type, audio files and, where `pip install sounddevice` was done, the microphone.
#
#   load_model=rwkv7-g1k-2.9b-20260930-ctx25600.pth sh demo/demo-chat.sh
#   echo "/audio question.wav" | load_model=rwkv7-g1k-2.9b-20260930-ctx25600.pth sh demo/demo-chat.sh
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}; so
# can any other that `sh demo/demo-chat.sh --help` lists. Empty: the program decides, and says what it chose. Write
# $HOME for ~. Arguments of this script go to train.py, and win over both.
set -a # train.py takes its settings from the environment

load_model="${load_model:-}"                 # the RWKV weights that the mission was trained with
adapter="${adapter:-}"                       # mission file; empty: the best of the newest run in proj_dir
mission="${mission:-}"                       # which, where there are files of several
proj_dir="${proj_dir:-}"                     # where training left its mission files; empty: output/ of this project

# The encoder and the adapter's shape that the mission was trained with; the .json beside a mission file tells them, and
# without one they are taken from here.
encoder="${encoder:-}"                       # empty: what the .json says, else microsoft/wavlm-large
downsample_k="${downsample_k:-}"             # empty: what the .json says, else 5
adapter_hidden="${adapter_hidden:-}"

max_audio_s="${max_audio_s:-}"               # seconds; longer audio is refused; empty: the longest that was trained on, or 30
beam="${beam:-1}"                            # beams; 1 is greedy, more is slower and often a little better
temperature="${temperature:-0.0}"            # draw answers, the more varied the higher; 0: the likeliest
max_new_tokens="${max_new_tokens:-}"         # longest answer in tokens; empty: the mission's
loop_guard="${loop_guard:-}"                 # 1: cut an answer that has begun to repeat itself

accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # which GPU, as in 1,; empty: the first
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU

# --- nothing to edit below ---
set +a
. "$(dirname -- "$0")/setup/launch.sh"
launch chat "$@"
