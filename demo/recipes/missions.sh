#!/bin/sh
# One mission to a line, on small sets of real recordings: ours beside what others get from the same frozen frames.
#
#   data_dir=/data/sets tiny=/data/whisper-tiny.en base=/data/whisper-base sh demo/recipes/missions.sh
#   lines="esc-10 sums" data_dir=... sh demo/recipes/missions.sh                  # some of them
#
# Each line trains adapter and state on the training half, and decodes the test half; beside it stand logistic
# regression on mean and deviation of the frames, and the majority class (labels), a CTC probe and Whisper's own decoder
# (transcripts), the best constant answer and Whisper's translation; beside rounds, a fresh state for the last one, and a
# past that was typed. Interrupted, the same command goes on. Every other
# setting of train.py can be given in the environment, too; a line that was trained under other settings is refused.

data_dir="${data_dir:-}"              # folder of the sets: see README.md
tiny="${tiny:-openai/whisper-tiny.en}" # Hugging Face name or folder: hears English, and what isn't language
base="${base:-openai/whisper-base}"   # the same: hears all other languages
load_model="${load_model:-}"          # RWKV weights; empty: demo/tiny/rwkv7-tiny-missions.pth
proj_dir="${proj_dir:-}"              # where everything lands; empty: output/missions/ of this project
lines="${lines:-}"                    # which; empty: all

# --- nothing to edit below ---
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
recipes=$root/demo/recipes
if [ -z "$data_dir" ]; then
    printf '%s: data_dir is not set: name the folder of the sets, data_dir=FOLDER sh %s\n' "${0##*/}" "$0" >&2
    exit 2
fi
proj_dir=${proj_dir:-$root/output/missions}
load_model=${load_model:-$root/demo/tiny/rwkv7-tiny-missions.pth}
python=$(sh "$root/demo/setup.sh")
export load_model

# Defaults of this recipe; each can be given in the environment.
export cache_features="${cache_features:-$proj_dir/features}" num_workers="${num_workers:-0}"
export save_steps="${save_steps:-0}" eval_bsz="${eval_bsz:-32}"
defaults='micro_bsz=16 adapter_hidden=256 standardise=1 spec_augment=1 lr_init=1e-3 lr_final=1e-4 state_lr_scale=5
    warmup_steps=20'

line() { # name, Whisper, seconds of its window, and its own settings; the environment goes before these and defaults
    name=$1 whisper=$2 encoder=$proj_dir/whisper/$2-${3}s seconds=$3 folder=$proj_dir/$1
    shift 3
    case " ${lines:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    given=''
    for setting in $defaults "$@"; do # of two of one name, the last counts
        eval "[ -n \"\${${setting%%=*}:-}\" ]" || given="$given $setting"
    done
    eval "decoder=\$$whisper"
    if [ ! -e "$encoder" ]; then
        mkdir -p "$proj_dir/whisper"
        "$python" "$recipes/shorten_whisper.py" --encoder "$decoder" --seconds "$seconds" --out "$encoder"
    fi
    "$python" "$recipes/missions.py" manifests "$name" "$data_dir" "$folder"
    settings="$data_dir $encoder$given $("$python" "$recipes/settings.py")"
    if [ -e "$folder/trained" ] && [ "$(cat "$folder/trained")" != "$settings" ]; then
        printf '%s: %s was trained with other settings: choose another proj_dir, or remove it\n' "${0##*/}" "$folder" >&2
        exit 2
    fi
    if [ ! -e "$folder/trained" ]; then
        # shellcheck disable=SC2086  # settings have no spaces
        env $given OP=train encoder="$encoder" data_dir='' proj_dir="$folder" train_split="$folder/train.jsonl" \
            sh "$root/demo/demo-state-tuning.sh"
        printf '%s\n' "$settings" >"$folder/trained"
    fi
    splits=''
    for split in "$folder"/test*.jsonl; do
        splits=$splits${splits:++}$split
    done
    OP=eval encoder="$encoder" data_dir='' proj_dir="$folder" eval_split="$splits" \
        sh "$root/demo/demo-state-tuning.sh"
    "$python" "$recipes/missions.py" baselines "$folder" --encoder "$encoder" --decoder "$decoder" \
        --cache "$cache_features"
}
line esc-10 tiny 6 epoch_count=32 speed_perturb=1 average=8
line emodb-4 tiny 10 epoch_count=36 downsample_k=2 state_lr_scale=0.5 average=8
line speaker tiny 3 epoch_count=8 downsample_k=2 state_lr_scale=0.5 average=4
line language base 12 epoch_count=3
line digits tiny 3 epoch_count=16 speed_perturb=1
line arabic base 3 epoch_count=80
line mandarin base 12 epoch_count=30 downsample_k=2
line russian base 12 epoch_count=60 downsample_k=2 speed_perturb=1
line translate base 12 epoch_count=12
line sums tiny 3 epoch_count=12 speed_perturb=1
line rounds tiny 3 epoch_count=1 micro_bsz=8 ctc_align=0.3 speed_perturb=1
"$python" "$recipes/missions.py" table "$proj_dir"
