#!/bin/sh
# Trains an adapter and an initial state on speech (OP=train), or measures their word error rate (OP=eval).
#
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth data_dir=/data sh demo/demo-state-tuning.sh
#   OP=eval load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth data_dir=/data sh demo/demo-state-tuning.sh
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}.
# Empty: the program decides, and says what it chose. Write $HOME for ~. Arguments of this script go to train.py, and
# win over both; `sh demo/demo-state-tuning.sh --help` lists them.
# shellcheck disable=SC2034 # the settings are read by name, below

OP="${OP:-train}" # train, eval

# --- models ---
load_model="${load_model:-}"                 # RWKV-6 weights, .pth or .safetensors: the one thing you must give
encoder="${encoder:-}"                       # Hugging Face name or folder; empty: the mission file's, else microsoft/wavlm-large
adapter="${adapter:-}"                       # mission file to train on from, or to evaluate; empty: none, or the newest
proj_dir="${proj_dir:-}"                     # where mission files, checkpoints and scores land; empty: output/
n_layer="${n_layer:-}"                       # layers and width of the language model: the file tells;
n_embd="${n_embd:-}"                         #   set them to be told when it is not the file you think it is
downsample_k="${downsample_k:-}"             # encoder frames to a position; empty: the mission file's, else 5
adapter_hidden="${adapter_hidden:-}"         # hidden units of the adapter; empty: the mission file's, else 2048

# --- data ---
data="${data:-librispeech}"                  # librispeech, a JSON-lines manifest, a folder, a Hugging Face dataset
data_dir="${data_dir:-}"                     # LibriSpeech's folder, or any in its layout; empty: from Hugging Face
download="${download:-}"                     # 1: fetch the LibriSpeech splits that data_dir lacks
train_split="${train_split:-}"               # joined by +; empty: train-clean-100+train-clean-360+train-other-500
valid_split="${valid_split:-}"               # joined by +; validated on while training; empty: no validation
eval_split="${eval_split:-}"                 # joined by +, each scored for itself; empty: test-clean+test-other
audio_column="${audio_column:-}"             # columns of a Hugging Face dataset, where the guess is wrong
text_column="${text_column:-}"
on_bad_audio="${on_bad_audio:-stop}"         # stop at a sample that can't be used, or skip and list it
cache_features="${cache_features:-}"         # folder that keeps the encoder's frames, computed once; empty: none
cache_dtype="${cache_dtype:-fp16}"           # how frames are kept: fp16, or int8 in half the disk
num_workers="${num_workers:-2}"              # processes that read audio, for each device; more if the GPU waits

# --- length and size of training ---
micro_bsz="${micro_bsz:-4}"                  # utterances per device and step: lower it first when memory runs out
max_batch_s="${max_batch_s:-}"               # seconds of audio per device and step, instead of micro_bsz utterances
accumulate_grad_batches="${accumulate_grad_batches:-1}" # raise it as micro_bsz x devices falls below 16
ctx_len="${ctx_len:-2048}"                   # longest sample in positions: 10 for each second, and its tokens
grad_cp="${grad_cp:-0}"                      # 1: less memory, more time
epoch_steps="${epoch_steps:-0}"              # optimiser steps to an epoch; 0: one pass over the data
epoch_count="${epoch_count:-3}"              # epochs to train
epoch_save="${epoch_save:-1}"                # epochs between mission files
save_steps="${save_steps:-1000}"             # steps between mission files within an epoch; 0: none
valid_steps="${valid_steps:-1000}"           # steps between validations, with valid_split
early_stop="${early_stop:-0}"                # end after so many validations without a lower word error rate; 0: never
average="${average:-0}"                      # 5: the mean of the last 5 mission files as well; 0: don't
on_nonfinite="${on_nonfinite:-stop}"         # stop at a batch whose loss is NaN or infinite, or skip it and list it
random_seed="${random_seed:-42}"             # of the adapter's first weights, the order of the data, and augmentation

# --- augmentation ---
speed_perturb="${speed_perturb:-}"           # 1: each sample at 0.9, 1.0 or 1.1 speed, drawn anew in each epoch
spec_augment="${spec_augment:-}"             # 1: mask stretches of time and bands of channels of the encoder's frames
noise_dir="${noise_dir:-}"                   # add noise, from the audio files of this folder; empty: none
noise_snr="${noise_snr:-}"                   # level of the speech above it in dB, drawn between LOW,HIGH; empty: 5,20

# --- learning ---
lr_init="${lr_init:-1e-4}"                   # learning rate after the warm-up
lr_final="${lr_final:-}"                     # at the end, reached exponentially; empty: lr_init all the way
warmup_steps="${warmup_steps:-100}"          # steps from 0.2 of the rate to all of it
state_lr_scale="${state_lr_scale:-1.0}"      # learning rate of the initial state, as a multiple of the adapter's
beta1="${beta1:-0.9}"                        # AdamW; seldom worth a change
beta2="${beta2:-0.99}"
adam_eps="${adam_eps:-1e-8}"
weight_decay="${weight_decay:-0.0}"
grad_clip="${grad_clip:-1.0}"                # norm that gradients are clipped to; 0: not at all
ctc_align="${ctc_align:-0}"                  # weight of a CTC loss that makes the adapter speak in embeddings; 0: none
ctc_align_steps="${ctc_align_steps:-0}"      # first steps by that loss alone; 500, say, where the loss won't fall
train_type="${train_type:-state}"            # what is trained beside the adapter

# --- machine ---
accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # how many, or which, as 0,2; empty: up to 4 GPUs, or one CPU process
num_nodes="${num_nodes:-1}"                  # machines
strategy="${strategy:-}"                     # how they share the work; empty: deepspeed_stage_1 on several GPUs
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU
wkv="${wkv:-auto}"                           # how the WKV operator is computed: auto, cuda, cpu, torch
wandb="${wandb:-}"                           # Weights & Biases project to log to; empty: none

# --- evaluation ---
eval_bsz="${eval_bsz:-8}"                    # utterances decoded together
beam="${beam:-1}"                            # beams; 1 is greedy
max_new_tokens="${max_new_tokens:-}"         # longest transcript in tokens; empty: as long as the audio makes likely
loop_guard="${loop_guard:-}"                 # 1: cut a transcript that has begun to repeat itself
perturb="${perturb:-}"                       # 1: each split also faster, slower and in noise
resume="${resume:-}"                         # 1: go on where an interrupted evaluation stopped

# --- nothing to edit below ---
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P) || exit
case "$OP" in
train | eval) ;;
predict) fail "OP=predict has a script of its own: demo/demo-predict.sh" ;;
*) fail "OP=$OP is neither train nor eval" ;;
esac
case "$load_model $* " in
[!\ ]* | *' --load_model'* | *' --help '*) ;; # given here, or as an argument
*)
    fail "load_model is not set: pass an RWKV-6 weight file, load_model=FILE sh $0; on Hugging Face, BlinkDL/rwkv-6-world" \
        "has 1.6B (RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth), 3B (RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth)" \
        "and 7B (RWKV-x060-World-7B-v2.1-20240507-ctx4096.pth)"
    ;;
esac
proj_dir=${proj_dir:-$root/output}

python=$(sh "$root/demo/setup.sh") || exit
PATH=$(dirname -- "$python"):$PATH # as activating the environment would

# Settings go before the arguments, which so have the last word.
for name in load_model encoder adapter proj_dir n_layer n_embd downsample_k adapter_hidden \
    data data_dir train_split valid_split eval_split audio_column text_column on_bad_audio cache_features cache_dtype num_workers \
    micro_bsz max_batch_s accumulate_grad_batches ctx_len grad_cp epoch_steps epoch_count epoch_save save_steps \
    valid_steps early_stop average on_nonfinite random_seed noise_dir noise_snr \
    lr_init lr_final warmup_steps state_lr_scale ctc_align ctc_align_steps beta1 beta2 adam_eps \
    weight_decay grad_clip train_type \
    accelerator devices num_nodes strategy precision wkv wandb eval_bsz beam max_new_tokens; do
    eval "value=\$$name"
    [ -z "$value" ] || set -- "--$name=$value" "$@"
done
for name in download speed_perturb spec_augment loop_guard perturb resume; do
    eval "value=\$$name"
    [ "${value:-0}" = 0 ] || set -- "--$name" "$@"
done
exec "$python" "$root/train.py" "--op=$OP" "$@"
