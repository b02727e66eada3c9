# Sourced by run_pa.sh and the scripts of precision/videobench: one-line errors, and which options a user has named.

refuse() {
    echo "error: $1; see \`bash $0 --help\`" >&2
    exit 2
}

# `named OPTION WORD...`: whether one of the words is the option, alone or with =VALUE, in either spelling.
named() {
    local option=${1//-/_} word
    shift
    for word in "$@"; do
        word=${word%%=*}
        [ "${word//-/_}" != "$option" ] || return 0
    done
    return 1
}

# `value_of OPTION WORD...`: prints the value that the words give the option; nothing without it.
value_of() {
    local option=$1
    shift
    while [ $# -gt 0 ]; do
        if named "$option" "$1"; then
            if [[ $1 = *=* ]]; then echo "${1#*=}"; else echo "${2:-}"; fi
            return
        fi
        shift
    done
}
