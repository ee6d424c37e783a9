#!/bin/sh
# Puts what OpenRC needs below $DESTDIR: a package of its own, beside that of packaging/install.sh.
set -eu
cd "$(dirname "$0")"
root=${DESTDIR:-}
for service in ephemeral-overlay ephemeral-overlay-syncd ephemeral-overlay-shutdown; do
    install -D -m 755 "$service" "$root/etc/init.d/$service"
done
install -D -m 644 rc.conf "$root/etc/rc.conf.d/ephemeral-overlay.conf"
