#!/bin/sh
# Serves missions at http://127.0.0.1:8000: OpenAI's API for transcription, translation and chat, and a page to talk on.
#
#   sh demo/setup.sh serve
#   load_model=rwkv7-g1k-2.9b-20260930-ctx25600.pth missions=asr.pth+de.pth+qa.pth sh demo/demo-serve.sh
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}; so
# can any other that `sh demo/demo-serve.sh --help` lists. Empty: the program decides, and says what it chose. Write
# $HOME for ~. Arguments of this script go to train.py, and win over both.
set -a # train.py takes its settings from the environment

load_model="${load_model:-}"                 # the RWKV weights that the missions were trained with
missions="${missions:-}"                     # mission files joined by +; empty: as adapter says
adapter="${adapter:-}"                       # the same; empty: the best of the newest run in proj_dir
proj_dir="${proj_dir:-}"                     # where training left its mission files; empty: output/ of this project

# The encoder and the adapter's shape that the missions were trained with; the .json beside a mission file tells them, and
# without one they are taken from here.
encoder="${encoder:-}"                       # empty: what the .json says, else microsoft/wavlm-large
downsample_k="${downsample_k:-}"             # empty: what the .json says, else 5
adapter_hidden="${adapter_hidden:-}"

host="${host:-}"                             # address to listen at; empty: 127.0.0.1, this machine alone
port="${port:-}"                             # empty: 8000
api_key="${api_key:-}"                       # what requests must show; empty: nothing
max_queue="${max_queue:-64}"                 # requests at a time
max_request_s="${max_request_s:-600.0}"      # longest audio of a request, in seconds
max_batch="${max_batch:-32}"                 # answers that are decoded together: lower it to save memory

max_audio_s="${max_audio_s:-}"               # seconds; longer audio is cut in pauses, or refused; empty: the longest that was trained on, or 30
beam="${beam:-1}"                            # beams; 1 is greedy, more is slower and often a little better
max_new_tokens="${max_new_tokens:-}"         # longest answer in tokens; empty: the mission's
loop_guard="${loop_guard:-}"                 # 1: cut an answer that has begun to repeat itself

accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # which GPU, as in 1,; empty: the first
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU

# --- nothing to edit below ---
set +a
. "$(dirname -- "$0")/setup/launch.sh"
launch serve "$@"
