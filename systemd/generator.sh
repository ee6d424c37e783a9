#!/bin/sh
# /usr/lib/systemd/system-generators/ephemeral-overlay: the file systems below our overlays stay mounted until the very
# end of a shutdown.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
export PATH
exec syncd generator "$@"
