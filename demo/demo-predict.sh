#!/bin/sh
# Transcribes audio files: one line each on standard output, and nothing else there; or subtitles, or JSON.
#
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth file_path=talk.flac sh demo/demo-predict.sh
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth sh demo/demo-predict.sh a.wav b.mp3 folder/ >texts
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}; so
# can any other that `sh demo/demo-predict.sh --help` lists. Empty: the program decides, and says what it chose. Write
# $HOME for ~. Arguments of this script are files, then flags of train.py if any; they win over both.
set -a # train.py takes its settings from the environment

file_path="${file_path:-}"                   # one audio file, folder or glob; several go as arguments
load_model="${load_model:-}"                 # the RWKV weights that the mission was trained with
adapter="${adapter:-}"                       # mission file; empty: the best of the newest run in proj_dir
proj_dir="${proj_dir:-}"                     # where training left its mission files; empty: output/ of this project

# The encoder and the adapter's shape that the mission was trained with; the .json beside a mission file tells them, and
# without one they are taken from here.
encoder="${encoder:-}"                       # empty: what the .json says, else microsoft/wavlm-large
downsample_k="${downsample_k:-}"             # empty: what the .json says, else 5
adapter_hidden="${adapter_hidden:-}"

format="${format:-text}"                     # text, a line for each file; json, with times; srt or vtt, subtitles
output_dir="${output_dir:-}"                 # folder for a transcript of each file; empty: all to standard output
max_audio_s="${max_audio_s:-}"               # seconds; longer audio is cut in pauses; empty: the longest that was trained on, or 30

eval_bsz="${eval_bsz:-8}"                    # files, or pieces of long ones, decoded together: lower it to save memory
beam="${beam:-1}"                            # beams; 1 is greedy, more is slower and often a little better
max_new_tokens="${max_new_tokens:-}"         # longest transcript in tokens; empty: as long as the audio makes likely
loop_guard="${loop_guard:-}"                 # 1: cut a transcript that has begun to repeat itself

accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # which GPU, as in 1,; empty: the first
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU
quant="${quant:-}"                           # int8 or nf4: the language model in less memory; empty: as the mission file says

# --- nothing to edit below ---
set +a
. "$(dirname -- "$0")/setup/launch.sh"
case "${1:-}" in
'' | --*) [ -n "$file_path$*" ] || fail "no audio given: pass file_path=FILE sh $0, or sh $0 FILE ..." ;;
*) set -- --file_path "$@" ;;
esac
launch predict "$@"
