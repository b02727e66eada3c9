# Functions of the two scripts of this folder. The scripts source this file and define `root` and `usage` before.

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

# Sets `positional`, and `extra` to the words after --.
read_arguments() {
    positional=() extra=()
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) usage; exit 0 ;;
        --) shift; extra=("$@"); break ;;
        -*) refuse "unknown option $1; options of answer_questions.py follow after --" ;;
        *) positional+=("$1") ;;
        esac
        shift
    done
}

# Replaces the script's process by answer_questions.py with the given options and `extra`.
answer_questions() {
    # shellcheck source=../../atb_pllava/cli/find_python.sh
    . "$root/atb_pllava/cli/find_python.sh"
    find_python "$root/requirements_pllava.txt"
    # A thread that spins while it waits keeps a core from the thread it waits for when other programs want the cores too.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    exec "$PYTHON" "$root/precision/videobench/answer_questions.py" "$@" "${extra[@]}"
}
