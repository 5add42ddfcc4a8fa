#!/bin/sh
# Transcribes audio files: one line each on standard output, and nothing else there; or subtitles, or JSON.
#
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth file_path=talk.flac sh demo/demo-predict.sh
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth sh demo/demo-predict.sh a.wav b.mp3 folder/ >texts
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}.
# Empty: the program decides, and says what it chose. Write $HOME for ~. Arguments of this script are files, then
# flags of train.py if any (`sh demo/demo-predict.sh --help` lists them); they win over both.
# shellcheck disable=SC2034 # the settings are read by name, below

file_path="${file_path:-}"                   # one audio file, folder or glob; several go as arguments
load_model="${load_model:-}"                 # the RWKV-6 weights that the mission was trained with
adapter="${adapter:-}"                       # mission file; empty: the newest in proj_dir
proj_dir="${proj_dir:-}"                     # where training left its mission files; empty: output/ of this project

# The encoder and the adapter's shape that the mission was trained with; the .json beside a mission file tells them, and
# without one they are taken from here.
encoder="${encoder:-}"                       # empty: what the .json says, else microsoft/wavlm-large
downsample_k="${downsample_k:-}"             # empty: what the .json says, else 5
adapter_hidden="${adapter_hidden:-}"
n_layer="${n_layer:-}"                       # layers and width of the language model: the file tells;
n_embd="${n_embd:-}"                         #   set them to be told when it is not the file you think it is

format="${format:-text}"                     # text, a line for each file; json, with times; srt or vtt, subtitles
output_dir="${output_dir:-}"                 # folder for a transcript of each file; empty: all to standard output
max_audio_s="${max_audio_s:-30}"             # seconds; longer audio is cut in pauses of speech, and joined again

eval_bsz="${eval_bsz:-8}"                    # files, or pieces of long ones, decoded together: lower it to save memory
beam="${beam:-1}"                            # beams; 1 is greedy, more is slower and often a little better
max_new_tokens="${max_new_tokens:-}"         # longest transcript in tokens; empty: as long as the audio makes likely
loop_guard="${loop_guard:-}"                 # 1: cut a transcript that has begun to repeat itself

accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # which GPU, as in 1,; empty: the first
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU
wkv="${wkv:-auto}"                           # how the WKV operator is computed: auto, cuda, cpu, torch

# --- nothing to edit below ---
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P) || exit
case "$load_model $* " in
[!\ ]* | *' --load_model'* | *' --help '*) ;; # given here, or as an argument
*)
    fail "load_model is not set: pass an RWKV-6 weight file, load_model=FILE sh $0; on Hugging Face, BlinkDL/rwkv-6-world" \
        "has 1.6B (RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth), 3B (RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth)" \
        "and 7B (RWKV-x060-World-7B-v2.1-20240507-ctx4096.pth)"
    ;;
esac
proj_dir=${proj_dir:-$root/output}

case "${1:-}" in
'' | --*)
    [ -n "$file_path$*" ] || fail "no audio given: pass file_path=FILE sh $0, or sh $0 FILE ..."
    [ -z "$file_path" ] || set -- --file_path "$file_path" "$@"
    ;;
*) set -- --file_path "$@" ;;
esac

python=$(sh "$root/demo/setup.sh") || exit
PATH=$(dirname -- "$python"):$PATH # as activating the environment would

# Settings go before the arguments, which so have the last word.
for name in load_model adapter proj_dir encoder downsample_k adapter_hidden n_layer n_embd \
    format output_dir max_audio_s eval_bsz beam max_new_tokens accelerator devices precision wkv; do
    eval "value=\$$name"
    [ -z "$value" ] || set -- "--$name=$value" "$@"
done
[ "${loop_guard:-0}" = 0 ] || set -- --loop_guard "$@"
exec "$python" "$root/train.py" --op=predict "$@"
