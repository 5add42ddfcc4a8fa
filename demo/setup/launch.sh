# What the launchers share, sourced by them once their settings are set:  launch OPERATION [argument of train.py ...]
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P) || exit

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

launch() {
    operation=$1
    shift
    case "$load_model $* " in
    [!\ ]* | *' --load_model'* | *' --help '*) ;; # given here, or as an argument
    *)
        fail "load_model is not set: pass an RWKV weight file, load_model=FILE sh $0; on Hugging Face, BlinkDL/rwkv7-g1 has" \
            "RWKV-7 from 0.1B to 13.3B, and BlinkDL/rwkv-6-world RWKV-6:" \
            "1.6B (RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth), 3B (RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth)" \
            "and 7B (RWKV-x060-World-7B-v2.1-20240507-ctx4096.pth)"
        ;;
    esac
    proj_dir=${proj_dir:-$root/output}
    python=$(sh "$root/demo/setup.sh" </dev/null) || exit
    PATH=$(dirname -- "$python"):$PATH # as activating the environment would
    exec "$python" "$root/train.py" --from_environment "--op=$operation" "$@"
}
