.PHONY: help up test bench loadtest images build lint clean
help:   ; @sed -n 's/^## //p' Makefile
## make up      install what is missing, build, run FastContainer with conf.d/ (root; LISTEN=host:port)
up:     ; @scripts/up
## make test    install what is missing, lint, build, run every test (root)
test:   ; @scripts/test
## make bench   install what is missing, build, measure beside nginx and bare Pingora (root)
bench:  ; @scripts/bench
## make loadtest  the paper's experiment and others: target/loadtest/report.html (root; ARGS="fig3 --long", see docs/loadtest.md)
loadtest: ; @scripts/loadtest $(ARGS)
## make images  build the images of the demonstration and test applications
images: ; @scripts/images
## make build   build the programs for development
build:  ; @scripts/build
## make lint    formatting, clippy, licences
lint:   ; @scripts/lint
## make clean   remove everything that was built
clean:  ; @rm -rf target images
