#!/bin/sh
# Trains an adapter and an initial state on speech (OP=train), or measures their word error rate (OP=eval).
#
#   load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth data_dir=/data sh demo/demo-state-tuning.sh
#   OP=eval load_model=RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth data_dir=/data sh demo/demo-state-tuning.sh
#
# Each setting can be edited here, between the quotes, or given in the environment, which wins over ${name:-value}; so
# can any other that `sh demo/demo-state-tuning.sh --help` lists. Empty: the program decides, and says what it chose.
# Write $HOME for ~. Arguments of this script go to train.py, and win over both.
set -a # train.py takes its settings from the environment

OP="${OP:-train}" # train, eval; export, with to=merged, state, ai00 or hub

# --- models ---
load_model="${load_model:-}"                 # RWKV-7 or RWKV-6 weights, .pth or .safetensors: you must give this
mission="${mission:-}"                       # translate, answer, label, describe, converse; empty: what rows or mission file name, else transcribe
encoder="${encoder:-}"                       # Hugging Face name or folder; empty: the mission file's, else microsoft/wavlm-large
adapter="${adapter:-}"                       # mission file to train on from, or to evaluate; empty: none, or the best
proj_dir="${proj_dir:-}"                     # where mission files, checkpoints and scores land; empty: output/
n_layer="${n_layer:-}"                       # layers and width of the language model: the file tells;
n_embd="${n_embd:-}"                         #   set them to be told when it is not the file you think it is
downsample_k="${downsample_k:-}"             # encoder frames to a position; empty: the mission file's, else 5
adapter_hidden="${adapter_hidden:-}"         # hidden units of the adapter; empty: the mission file's, else 2048
quant="${quant:-}"                           # int8 or nf4: the language model in less memory; empty: as the mission file says

# --- data ---
data="${data:-librispeech}"                  # librispeech, a JSON-lines manifest, a folder, a Hugging Face dataset
data_dir="${data_dir:-}"                     # LibriSpeech's folder, or any in its layout; empty: from Hugging Face
download="${download:-}"                     # 1: fetch the LibriSpeech splits that data_dir lacks
train_split="${train_split:-}"               # joined by +; empty: train-clean-100+train-clean-360+train-other-500
valid_split="${valid_split:-}"               # joined by +; validated on while training; empty: no validation
eval_split="${eval_split:-}"                 # joined by +, each scored for itself; empty: test-clean+test-other
on_bad_audio="${on_bad_audio:-stop}"         # stop at a sample that can't be used, or skip and list it
cache_features="${cache_features:-}"         # folder that keeps the encoder's frames, computed once; empty: none
num_workers="${num_workers:-2}"              # processes that read audio, for each device; more if the GPU waits

# --- length and size of training ---
micro_bsz="${micro_bsz:-4}"                  # utterances per device and step: lower it first when memory runs out
accumulate_grad_batches="${accumulate_grad_batches:-1}" # raise it as micro_bsz x devices falls below 16
ctx_len="${ctx_len:-2048}"                   # longest sample in positions: 10 for each second, and its tokens
grad_cp="${grad_cp:-0}"                      # 1: less memory, more time
compile="${compile:-}"                       # 1: faster steps on a GPU, after a minute or two of compiling
epoch_steps="${epoch_steps:-0}"              # optimiser steps to an epoch; 0: one pass over the data
epoch_count="${epoch_count:-3}"              # epochs to train
save_steps="${save_steps:-1000}"             # steps between mission files within an epoch; 0: none
valid_steps="${valid_steps:-1000}"           # steps between validations, with valid_split
early_stop="${early_stop:-0}"                # end after so many validations without a better score; 0: never
average="${average:-0}"                      # 5: the mean of the last 5 mission files as well; 0: don't
random_seed="${random_seed:-42}"             # of the adapter's first weights, the order of the data, and augmentation

# --- learning ---
lr_init="${lr_init:-1e-4}"                   # learning rate after the warm-up
lr_final="${lr_final:-}"                     # at the end, reached exponentially; empty: lr_init all the way
warmup_steps="${warmup_steps:-100}"          # steps from 0.2 of the rate to all of it
state_lr_scale="${state_lr_scale:-1.0}"      # learning rate of the initial state, as a multiple of the adapter's
weight_decay="${weight_decay:-0.0}"          # of the adapter's matrices
ctc_align="${ctc_align:-0}"                  # weight of a CTC loss that draws the adapter to embeddings; 0: none
ctc_align_steps="${ctc_align_steps:-0}"      # first steps by that loss alone; 500, say, where the loss won't fall
speed_perturb="${speed_perturb:-}"           # 1: each sample at 0.9, 1.0 or 1.1 speed, drawn anew in each epoch
spec_augment="${spec_augment:-}"             # 1: mask stretches of time and bands of channels of the encoder's frames
noise_dir="${noise_dir:-}"                   # add noise, from the audio files of this folder; empty: none

# --- machine ---
accelerator="${accelerator:-auto}"           # auto, gpu, cpu
devices="${devices:-${device:-}}"            # how many, or which, as 0,2; empty: up to 4 GPUs, or one CPU process
num_nodes="${num_nodes:-1}"                  # machines
strategy="${strategy:-}"                     # how they share the work; empty: deepspeed_stage_1 on several GPUs
precision="${precision:-}"                   # bf16, fp16, tf32, fp32; empty: bf16 on a GPU, fp32 on a CPU
wandb="${wandb:-}"                           # Weights & Biases project to log to; empty: none

# --- evaluation ---
eval_bsz="${eval_bsz:-8}"                    # utterances decoded together
beam="${beam:-1}"                            # beams, also in validation; 1 is greedy
max_new_tokens="${max_new_tokens:-}"         # longest transcript in tokens; empty: as long as the audio makes likely
loop_guard="${loop_guard:-}"                 # 1: cut a transcript that has begun to repeat itself
perturb="${perturb:-}"                       # 1: each split also faster, slower and in noise
resume="${resume:-}"                         # 1: go on where an interrupted evaluation stopped

# --- nothing to edit below ---
set +a
. "$(dirname -- "$0")/setup/launch.sh"
case "$OP" in
train | eval | export) launch "$OP" "$@" ;;
predict) fail "OP=predict has a script of its own: demo/demo-predict.sh" ;;
*) fail "OP=$OP is none of train, eval, export" ;;
esac
