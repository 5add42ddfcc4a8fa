#!/bin/sh
# The whole idea within minutes, on a CPU and without a download: trains an adapter and an initial state beside a tiny
# frozen speech encoder and a tiny frozen RWKV (demo/tiny), evaluates them on sentences never heard, and transcribes.
#
#   sh demo/demo-quickstart.sh
#   file_path=my.wav sh demo/demo-quickstart.sh
#
# The speech is synthetic: demo/tiny/README.md. Settings of train.py can be given in the environment here, too.

generation="${generation:-6}"                # of the language model: 6 or 7
file_path="${file_path:-}"                   # a recording of yours to transcribe as well
proj_dir="${proj_dir:-}"                     # where everything lands; empty: output/quickstart/ of this project

export random_seed="${random_seed:-42}"      # of the adapter's first weights and of the data's order
export downsample_k="${downsample_k:-1}" adapter_hidden="${adapter_hidden:-1024}"
export micro_bsz="${micro_bsz:-16}" epoch_count="${epoch_count:-6}" warmup_steps="${warmup_steps:-20}"
export lr_init="${lr_init:-2e-3}" lr_final="${lr_final:-2e-4}" state_lr_scale="${state_lr_scale:-5}"
export ctc_align="${ctc_align:-0.2}" ctc_align_steps="${ctc_align_steps:-150}" valid_steps="${valid_steps:-100}"
export num_workers="${num_workers:-0}" eval_bsz="${eval_bsz:-50}" beam="${beam:-4}" accelerator="${accelerator:-cpu}"

# --- nothing to edit below ---
set -eu
case "$generation" in
6 | 7) ;;
*)
    echo "${0##*/}: generation=$generation; expected 6 or 7" >&2
    exit 2
    ;;
esac
# A second thread helps models of this size little, and harms much where something else runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
corpus=demo/tiny/corpus
proj_dir=${proj_dir:-$root/output/quickstart}
case "$proj_dir" in
/*) ;;
*) proj_dir=$PWD/$proj_dir ;;
esac
export load_model="$root/demo/tiny/rwkv$generation-tiny.pth" encoder="$root/demo/tiny/wavlm-tiny" data_dir=''
python=$(sh "$root/demo/setup.sh")
began=$(date +%s)

say() { printf '\n== %s\n' "$*" >&2; }
quickstart() { "$python" "$root/demo/tiny/quickstart.py" --load_model "$load_model" --encoder "$encoder" "$@"; }
evaluate() { (cd "$root" && OP=eval proj_dir="$1" eval_split="$corpus/test.jsonl" sh demo/demo-state-tuning.sh) >&2; }

say "Before training: adapter and initial state as they are made"
quickstart --folder "$proj_dir/untrained" untrained \
    --downsample_k "$downsample_k" --adapter_hidden "$adapter_hidden" --random_seed "$random_seed"
evaluate "$proj_dir/untrained"

say "Training the adapter and the initial state; language model and speech encoder stay as they are"
OP=train proj_dir="$proj_dir" train_split="$root/$corpus/train.jsonl" valid_split="$root/$corpus/valid.jsonl" \
    cache_features="$proj_dir/features" sh "$root/demo/demo-state-tuning.sh" >&2

say "After training: the same sentences"
evaluate "$proj_dir"

say "Transcripts: a sentence of the test${file_path:+, and your file}"
proj_dir="$proj_dir" sh "$root/demo/demo-predict.sh" "$root/$corpus/test/0000.ogg" ${file_path:+"$file_path"}

quickstart --folder "$proj_dir" table --seconds "$(($(date +%s) - began))"
