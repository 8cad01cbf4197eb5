#!/usr/bin/env bash
# Fetches the libraries of the viewer from npm, at the versions below, into treepo_swift/view/web/vendor, each with its
# licence, and records what came (SHA256SUMS, which a test compares). The repository holds the result: nobody else needs npm.
set -euo pipefail
target=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/treepo_swift/view/web/vendor
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$target"

vendor() { # package, version, file
    (cd "$work" && npm pack --silent "$1@$2" >/dev/null && tar xzf "$1-$2.tgz")
    cp "$work/package/$3" "$target/$1-$2.min.js"
    cp "$work/package/LICENSE" "$target/$1-$2.LICENSE"
    rm -rf "$work/package"
}

rm -f "$target"/*
vendor d3-hierarchy 3.1.3 dist/d3-hierarchy.min.js
vendor diff 9.0.0 dist/diff.min.js
(cd "$target" && sha256sum -- *.LICENSE *.min.js >SHA256SUMS)
