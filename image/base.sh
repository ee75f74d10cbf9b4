#!/usr/bin/env bash
# Make a Debian 12 base image with debootstrap, for a machine that reaches a Debian mirror but no image registry:
#     image/base.sh IMAGE [MIRROR]
# It takes the place of debian:bookworm-slim, the Dockerfile's default. Needs root, debootstrap and buildah.
set -euo pipefail
image=${1:?usage: image/base.sh IMAGE [MIRROR]}
mirror=${2:-http://deb.debian.org/debian}

root=$(mktemp -d)
container=
clean() {
  [ -z "$container" ] || buildah rm "$container" >/dev/null
  rm -rf --one-file-system "$root"
}
trap clean EXIT

if ! debootstrap --variant=minbase --include=ca-certificates bookworm "$root" "$mirror" >"$root.log" 2>&1; then
  tail -n 20 "$root.log" >&2
  exit 1
fi
rm -f "$root.log"
# As Debian's slim images: no documentation, no package lists; security updates are on.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
cat >"$root/etc/apt/sources.list" <<SOURCES
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb ${mirror%/debian}/debian-security bookworm-security main
SOURCES
cat >"$root/etc/dpkg/dpkg.cfg.d/slim" <<SLIM
path-exclude /usr/share/doc/*
path-exclude /usr/share/man/*
path-exclude /usr/share/locale/*
SLIM

cat >"$root/etc/apt/apt.conf.d/slim" <<SLIM
APT::Keep-Downloaded-Packages "false";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
SLIM

container=$(buildah from scratch)
buildah add --quiet "$container" "$root" / >/dev/null
buildah config --cmd '["/bin/bash"]' "$container"
buildah commit --quiet "$container" "$image" >/dev/null
echo "$image: $(du -sm "$root" | cut -f1) MB"
