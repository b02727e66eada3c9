# Functions of the two scripts of this folder. The scripts source this file and define `root` and `usage` before.

# shellcheck source=../../atb_pllava/cli/script_arguments.sh
. "$root/atb_pllava/cli/script_arguments.sh"

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
