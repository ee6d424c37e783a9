#!/bin/sh
# /usr/lib/systemd/system-shutdown/ephemeral-overlay, and /usr/lib/ephemeral-overlay/last-stage for every other init: the
# last executable to run. Every process is dead, our tmpfs is still there. systemd has unmounted the overlays and made the
# root read-only; where they are still mounted they are unmounted first.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
# Nothing of an overlay is to be in use.
cd /
# Nobody else is left to read what it says.
exec syncd last-stage >/dev/console 2>&1
