#!/bin/sh
# The initial state at work: one adapter, and a mission for each state. On the Free Spoken Digit Dataset.
#
#   data_dir=/data/free-spoken-digit-dataset encoder=/data/whisper-2s sh demo/recipes/state-at-work.sh
#
# Four missions (the digit in English, in Chinese characters, the next number, the speaker) learn together, with one
# adapter; then a fifth one (the digit in German) by its state alone, beside that adapter; and, to compare, the adapter
# alone, with all states zero. Prints a table: each mission's test recordings with each state. Interrupted, the same
# command goes on. Every other setting of train.py can be given in the environment, too.

data_dir="${data_dir:-}"                     # the repository's folder, or recordings/ of it
encoder="${encoder:-openai/whisper-tiny.en}" # Hugging Face name or folder
load_model="${load_model:-}"                 # RWKV weights; empty: demo/tiny/rwkv6-tiny-listening.pth
proj_dir="${proj_dir:-}"                     # where everything lands; empty: output/state-at-work/ of this project

# --- nothing to edit below ---
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
if [ -z "$data_dir" ]; then
    printf '%s: data_dir is not set: name the folder of the digits, data_dir=FOLDER sh %s\n' "${0##*/}" "$0" >&2
    exit 2
fi
proj_dir=${proj_dir:-$root/output/state-at-work}
load_model=${load_model:-$root/demo/tiny/rwkv6-tiny-listening.pth}
python=$(sh "$root/demo/setup.sh")
data=$proj_dir/data
script=$root/demo/recipes/state_at_work.py

# Defaults of this recipe; each can be given in the environment.
export load_model encoder micro_bsz="${micro_bsz:-32}" adapter_hidden="${adapter_hidden:-512}"
export lr_init="${lr_init:-1e-3}" lr_final="${lr_final:-1e-4}" state_lr_scale="${state_lr_scale:-5}"
export epoch_count="${epoch_count:-8}" warmup_steps="${warmup_steps:-50}" save_steps="${save_steps:-0}"
export num_workers="${num_workers:-0}" cache_features="$proj_dir/features"

"$python" "$script" manifests "$data_dir" "$data"
train() { # folder, manifest, and settings
    folder=$proj_dir/$1
    split=$data/$2.jsonl
    shift 2
    [ -e "$folder/trained" ] || {
        env mission= labels= share_adapter=1 valid_split= load_state= "$@" OP=train data_dir='' proj_dir="$folder" train_split="$split" sh "$root/demo/demo-state-tuning.sh"
        : >"$folder/trained"
    }
}
train four train adapter=
train zero train adapter= train_type=adapter
adapter=$("$python" "$script" newest "$proj_dir/four/label/english")
train fifth train-german train_type=state lr_init=1e-2 adapter="$adapter"
"$python" "$script" table "$proj_dir" --load_model "$load_model"
