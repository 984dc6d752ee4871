#!/usr/bin/env bash
# get_apptainer.sh FOLDER: a real Apptainer as FOLDER/bin/apptainer, for the tests. Needs apt-get, dpkg and patchelf, not root.
#
# Debian has apptainer in its unstable suite only, built for a newer C library than a stable system's. It is
# unpacked with that library beside it, and nothing of the system changes.
set -euo pipefail
folder=$(realpath -m "$1")

for tool in apt-get dpkg patchelf; do
    command -v "$tool" > /dev/null || { echo "get_apptainer.sh: no $tool here" >&2; exit 1; }
done
# The mirror that this machine already uses.
# shellcheck disable=SC2016 # apt expands it
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/$' | head -n 1) ||
    { echo "get_apptainer.sh: this machine has no Debian mirror in its apt sources" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,packages}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror unstable main" > "$work/sources.list"
apt=(apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/nonexistent
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache")
"${apt[@]}" update
(cd "$work/packages" && "${apt[@]}" download apptainer libc6 libseccomp2 libsqlite3-0)
for package in "$work"/packages/*.deb; do
    dpkg --extract "$package" "$work/unpacked"
done

# The programs look for their settings and folders beside themselves: usr/ becomes FOLDER.
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"  # of a clean clone nothing is there yet
mv "$work/unpacked/usr" "$folder"
mv "$work/unpacked/etc" "$folder/etc"
mkdir -p "$folder"/{,lib/}var/lib/apptainer/mnt/session
ln -s ../etc "$folder/lib/etc"
libraries=$(echo "$folder"/lib/*-linux-gnu)
for program in "$folder/bin/apptainer" "$libraries/apptainer/bin/starter"; do
    patchelf --set-interpreter "$(echo "$libraries"/ld-linux-*.so.*)" "$program"
    patchelf --force-rpath --set-rpath "$libraries" "$program"
done
patchelf --force-rpath --set-rpath "$libraries" "$(realpath "$libraries/libsqlite3.so.0")"
# Root of a virtual machine or a container may lack capabilities that apptainer would hand on.
sed -i 's/^root default capabilities = full/root default capabilities = no/' "$folder/etc/apptainer/apptainer.conf"
"$folder/bin/apptainer" --version
