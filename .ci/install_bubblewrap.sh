#!/usr/bin/env bash
# Installs bubblewrap where that needs no question (root, on Debian and its kin); elsewhere says how. Never fails:
# the tests of the sandbox do, where it is missing.
set -u

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing bubblewrap, which the sandbox needs"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install --yes --quiet --quiet bubblewrap >/dev/null 2>&1 ||
        { apt-get update --quiet --quiet && apt-get install --yes --quiet --quiet bubblewrap; } >/dev/null
fi
command -v bwrap >/dev/null && exit 0
echo "bubblewrap (the command bwrap) is missing, so the tests of the sandbox will fail. Install it with one of:"
echo "  sudo apt-get install bubblewrap    sudo dnf install bubblewrap    sudo pacman -S bubblewrap"
