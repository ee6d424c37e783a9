#!/bin/sh
# Puts everything where it belongs, below $DESTDIR: what a package is made of. Builds nothing.
#
#   packaging/install.sh STATIC SYNCD
#
# STATIC is the directory with the static early and syncd for the initramfs, SYNCD the syncd of the system.
set -eu
static=$1 syncd=$2
cd "$(dirname "$0")/.."
root=${DESTDIR:-}
lib=$root/usr/lib/ephemeral-overlay
units=$root/usr/lib/systemd/system

put() { install -D -m "$1" "$2" "$3"; }

put 755 "$syncd" "$root/usr/bin/syncd"
put 644 README.md "$root/usr/share/doc/ephemeral-overlay/README.md"
put 755 "$static/early" "$lib/initramfs/early"
put 755 "$static/syncd" "$lib/initramfs/syncd"
put 644 packaging/counterpart "$lib/counterpart"
put 644 mkinitcpio/install/ephemeral-overlay "$root/usr/lib/initcpio/install/ephemeral-overlay"
put 644 mkinitcpio/hooks/ephemeral-overlay "$root/usr/lib/initcpio/hooks/ephemeral-overlay"
for unit in systemd/*.service; do
    put 644 "$unit" "$units/${unit##*/}"
done
for drop_in in ephemeral-overlay ephemeral-overlay-; do
    put 644 systemd/sandbox.conf "$units/$drop_in.service.d/sandbox.conf"
done
put 644 systemd/user@.service.d/ephemeral-overlay.conf "$units/user@.service.d/ephemeral-overlay.conf"
put 644 packaging/logrotate "$root/etc/logrotate.d/ephemeral-overlay"
put 755 systemd/system-shutdown.sh "$root/usr/lib/systemd/system-shutdown/ephemeral-overlay"
put 755 systemd/system-shutdown.sh "$lib/last-stage"
put 755 systemd/generator.sh "$root/usr/lib/systemd/system-generators/ephemeral-overlay"
