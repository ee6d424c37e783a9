#!/bin/sh
# /usr/lib/systemd/system-shutdown/ephemeral-overlay: the last executable to run. Every process is dead, the overlays are
# unmounted, the root is read-only, our tmpfs is still there.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
export PATH
# Nobody else is left to read what it says.
exec syncd last-stage >/dev/console 2>&1
