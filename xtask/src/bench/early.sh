# What early does, with mount(8): sh bench.sh ROOT RUN_DIR
set -eu
R=$1 X=$2
umask 077

mkdir -p "$X/ram" "$X/store" "$X/lower/etc" "$X/lower/var-log" "$R/persist/ephemeral-overlay"
read -r _ kib _ </proc/meminfo
size=$((kib * 1024 / 100 * 90))
mount -t tmpfs -o "size=$size,nr_inodes=$((size / 16384)),mode=0700" --make-private ephemeral-overlay "$X/ram"
mount --bind --make-private "$R/persist/ephemeral-overlay" "$X/store"

mkdir -p "$X/ram/etc/upper" "$X/ram/etc/work" "$X/ram/var-log/upper" "$X/ram/var-log/work"
overlay() {
    lower=$X/lower/$2 upper=$X/ram/$2/upper work=$X/ram/$2/work
    mount --bind --make-private "$R$1" "$lower"
    chown --reference="$lower" "$upper"
    chmod --reference="$lower" "$upper"
    touch --reference="$lower" "$upper"
    mount --bind --make-private "$lower" "$R$1"
    mount -o remount,bind,ro "$R$1"
    mount -t overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work,redirect_dir=nofollow,metacopy=off,index=off,xino=on" \
        ephemeral-overlay "$R$1"
}
overlay /etc etc
overlay /var/log var-log

# The mode and owner that each folder has on disk.
stat -c '%a %u %g %n' "$R/tmp" "$R/var/tmp" "$R/var/cache" "$R/srv/scratch" | while read -r mode uid gid path; do
    case $path in
        "$R/tmp") size=5G ;;
        "$R/var/tmp") size=1G ;;
        "$R/var/cache") size=2G ;;
        *) size=64M ;;
    esac
    mount -t tmpfs -o "nosuid,nodev,strictatime,size=$size,mode=$mode,uid=$uid,gid=$gid" ephemeral-overlay "$path"
done
echo "mounted /etc /var/log /tmp /var/tmp /var/cache /srv/scratch" > "$X/boot"
