#!/usr/bin/env bash
# Runs build() of an mkinitcpio install script as mkinitcpio does, and writes down what it adds instead of building
# an image. On standard output, one line for each thing, with tabs between the fields:
#     file SOURCE DESTINATION MODE | link PATH TARGET | directory PATH MODE | module NAME
#
#   mkinitcpio.bash INSTALL_SCRIPT STAGE FLAVOUR
#
# STAGE is a directory in which our package lies installed; everything else is the machine's. FLAVOUR is busybox, systemd,
# or systemd-behind: its hook stands behind ours, so what it brings is not there yet. The functions behave as documented in mkinitcpio(8), version 41.
set -u
script=$1 stage=$2 flavour=$3
failed=0
exec 3>&1 1>&2

record() { local IFS=$'\t'; printf '%s\n' "$*" >&3; }
quiet() { :; }
plain() { printf '%s\n' "$*"; }
msg() { plain "$@"; }
msg2() { plain "$@"; }
warning() { plain "WARNING: $*"; }
error() { plain "ERROR: $*"; failed=1; return 1; }
command_not_found_handle() { error "mkinitcpio has no function $1, and this machine no such program"; }

# The file that a path or a program's name means.
find_source() {
    if [[ $1 != /* ]]; then
        PATH=$stage/usr/bin:$PATH type -P "$1"
    elif [[ -e $stage$1 ]]; then
        printf '%s\n' "$stage$1"
    elif [[ -e $1 ]]; then
        printf '%s\n' "$1"
    else
        return 1
    fi
}

# The path without the stage.
installed_at() { printf '%s\n' "${1#"$stage"}"; }

add_dir() { record directory "$1" "${2:-755}"; }

add_file() {
    local src
    src=$(find_source "$1") || { error "file not found: '$1'"; return 1; }
    record file "$src" "${2:-$(installed_at "$src")}" "${3:-$(stat -c %a "$src")}"
}

add_binary() {
    local src library
    src=$(find_source "$1") || { error "binary not found: '$1'"; return 1; }
    add_file "$src" "${2:-$(installed_at "$src")}" "${3:-$(stat -c %a "$src")}" || return 1
    while read -r library; do
        add_file "$library" || return 1
    done < <(ldd "$src" 2>/dev/null | grep -o '/[^ ]*')
}

add_symlink() { record link "$1" "${2:-}"; }
add_module() { record module "${1%.ko*}"; }
add_checked_modules() { error "add_checked_modules: autodetect would drop what is not in use on this machine"; }

# The run-time script with the name of the install script that calls this.
add_runscript() {
    local name=${BASH_SOURCE[1]##*/}
    add_file "/usr/lib/initcpio/hooks/$name" "/hooks/$name" 755
}

case $flavour in
    busybox) HOOKS=(base udev filesystems ephemeral-overlay) ;;
    systemd) HOOKS=(base systemd filesystems ephemeral-overlay) ;;
    systemd-behind) HOOKS=(base ephemeral-overlay systemd filesystems) ;;
esac

if [[ $flavour == systemd ]]; then
    # With the programs that it runs and the units that it requires, as the real one.
    add_systemd_unit() {
        local unit file directory key value
        for unit; do
            file=
            for directory in /etc /usr/lib; do
                [[ -n $file ]] || file=$(find_source "$directory/systemd/system/$unit")
            done
            [[ -n $file ]] || { error "unit not found: '$unit'"; return 1; }
            add_file "$file" || return 1
            while IFS='=' read -r key value; do
                case $key in
                    Requires) add_systemd_unit $value ;;
                    Exec*) [[ $value == -* ]] || add_binary "$(set -- $value; printf '%s' "${1#[@!:+]}")" ;;
                esac || return 1
            done <"$file"
        done
    }
fi

# shellcheck source=/dev/null
source "$script" || exit 1
declare -F build >/dev/null || { error "$script defines no build()"; exit 1; }
declare -F help >/dev/null || { error "$script defines no help()"; exit 1; }
build || { error "build() ended with $?"; exit 1; }
exit "$failed"
