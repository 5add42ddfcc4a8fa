#!/bin/sh
# A small amount of recorded speech and a pretrained encoder: ours beside what others get from the same frozen frames.
#
#   data_dir=/data/corpus encoder=/data/whisper-tiny.en sh demo/recipes/real-speech.sh
#   eval_dir=/data/other data_dir=... encoder=... sh demo/recipes/real-speech.sh      # and a folder never seen
#
# Sets speakers of data_dir aside, trains adapter and state on the others, and prints one table for the speakers set
# aside: ours, a CTC probe on the same frames and, where the encoder is Whisper's, Whisper's own decoder. Interrupted,
# the same command goes on. Every other setting of train.py can be given in the environment, too.

data_dir="${data_dir:-}"                     # a folder in LibriSpeech's layout: what to train on
eval_dir="${eval_dir:-}"                     # another, to be evaluated as a whole; empty: none
encoder="${encoder:-openai/whisper-tiny.en}" # Hugging Face name or folder
decoder="${decoder:-$encoder}"               # the Whisper whose own decoder is the yardstick, if it is one
load_model="${load_model:-}"                 # RWKV-6 weights; empty: demo/tiny/rwkv6-tiny-listening.pth
proj_dir="${proj_dir:-}"                     # where everything lands; empty: output/real-speech/ of this project
held_out="${held_out:-0.2}"                  # part of the speakers that is set aside
more_data="${more_data:-}"                   # manifests to train on besides, joined by +; empty: none
repeat="${repeat:-1}"                        # how often data_dir's recordings come, to each time that more_data does

# --- nothing to edit below ---
set -eu
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
recipes=$root/demo/recipes
[ -n "$data_dir" ] || fail "data_dir is not set: name a folder in LibriSpeech's layout, data_dir=FOLDER sh $0"
case $repeat in '' | 0* | *[!0-9]*) fail "repeat=$repeat: expected a whole number, at least 1" ;; esac
proj_dir=${proj_dir:-$root/output/real-speech}
load_model=${load_model:-$root/demo/tiny/rwkv6-tiny-listening.pth}
python=$(sh "$root/demo/setup.sh")
export load_model encoder proj_dir

# Defaults of this recipe; each can be given in the environment.
export downsample_k="${downsample_k:-2}" adapter_hidden="${adapter_hidden:-1024}" micro_bsz="${micro_bsz:-16}"
export ctc_align="${ctc_align:-0.5}" ctc_align_steps="${ctc_align_steps:-2200}" spec_augment="${spec_augment:-1}"
export lr_init="${lr_init:-2e-3}" lr_final="${lr_final:-1e-4}" state_lr_scale="${state_lr_scale:-5}"
export weight_decay="${weight_decay:-0.01}" epoch_steps="${epoch_steps:-770}" epoch_count="${epoch_count:-6}"
export save_steps="${save_steps:-60}" average="${average:-4}" num_workers="${num_workers:-0}"
export eval_bsz="${eval_bsz:-24}" beam="${beam:-8}" random_seed="${random_seed:-42}"
probe_steps="${probe_steps:-2000}"

# Speakers set aside must stay those that the training never saw, so a trained project keeps its settings.
settings="$data_dir $held_out $more_data $repeat $decoder $probe_steps $("$python" "$recipes/settings.py")"
if [ -e "$proj_dir/trained" ] && [ "$(cat "$proj_dir/trained")" != "$settings" ]; then
    fail "$proj_dir was trained with other settings ($proj_dir/trained): choose another proj_dir"
fi

"$python" "$recipes/split_speakers.py" --data_dir "$data_dir" --out "$proj_dir/data" --held_out "$held_out"
own=$proj_dir/data/train.jsonl
train=$own
times=1
while [ "$times" -lt "$repeat" ]; do
    train=$train+$own
    times=$((times + 1))
done
train=$train${more_data:++$more_data}
features=$proj_dir/features
if [ ! -e "$proj_dir/trained" ]; then
    OP=train data_dir='' train_split="$train" cache_features="$features" sh "$root/demo/demo-state-tuning.sh"
    printf '%s\n' "$settings" >"$proj_dir/trained"
fi

compare() { # heading, split, name of the split's records
    OP=eval data_dir='' eval_split="$2" sh "$root/demo/demo-state-tuning.sh"
    "$python" "$recipes/baselines.py" --encoder "$encoder" --decoder "$decoder" --train "$train" --test "$2" \
        --cache "$features" --steps "$probe_steps" --probe "$proj_dir/probe.pth" --out "$proj_dir/baselines/$3"
    "$python" "$recipes/compare.py" --name "$1" --train "$own${more_data:++$more_data}" \
        "ours=$proj_dir/eval/$3.jsonl" "$proj_dir/baselines/$3"
}
compare "speakers set aside" "$proj_dir/data/valid.jsonl" valid
[ -z "$eval_dir" ] || compare "$eval_dir" "$eval_dir/" "$(basename -- "$eval_dir")"
