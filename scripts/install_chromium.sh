#!/bin/sh
# A browser for the tests of pages: one that is installed, else Debian's, else Playwright's own build.
#     sh scripts/install_chromium.sh PYTHON
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then exit 0; fi
done
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes chromium > /dev/null
else
    "$1" -m playwright install chromium
fi
