# Sourced by the other scripts. Everything runs from the top of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

need_root() { # need_root WHAT
    [ "$(id -u)" = 0 ] || fail "\`make $1\` makes containers, which only root may do: run it as root, for example with \`sudo make $1\`."
}

# Under sudo the toolchain is usually the caller's own and not in root's PATH.
find_rust() {
    local home
    for home in "${HOME:-/root}" "$(getent passwd "${SUDO_USER:-}" 2>/dev/null | cut -d: -f6)"; do
        command -v cargo >/dev/null && return
        [ -n "$home" ] && [ -x "$home/.cargo/bin/cargo" ] || continue
        export PATH="$home/.cargo/bin:$PATH" RUSTUP_HOME="${RUSTUP_HOME:-$home/.rustup}" CARGO_HOME="${CARGO_HOME:-$home/.cargo}"
    done
    command -v cargo >/dev/null || fail "no Rust toolchain found: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer (rustup.rs), then run this again."
}
