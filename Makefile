# Every command is a line here and a function elsewhere: tools/, lab/.
PYTHON ?= python3
SERIES = PYTHONPATH=tools $(PYTHON) -m series
RUN = PYTHONPATH=tools $(PYTHON) -m runner

.DEFAULT_GOAL := help
.PHONY: help ready tree save check series wheel test style unit functional \
	newer-python sanitize each lab lab-down lab-test bench demo

help:         ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

ready:        ## install the system packages of bindep.txt that are missing
	@$(RUN) system

tree:         ## make tree/, the Nova checkout in which one works, from the repository (TOPIC=NAME: up to the end of that topic)
	@$(SERIES) tree $(if $(TOPIC),--topic $(TOPIC))

save:         ## write the commits of tree/ to the repository
	@$(SERIES) save

check:        ## prove that tree and repository agree and that each commit is in form
	@$(SERIES) check

series:       ## dist/: mails for git am, also by topic, a quilt directory, source distribution, wheel; branches topic/NAME in tree/
	@$(SERIES) export
	@$(RUN) dist

wheel:        ## dist/: a wheel of Nova with the series applied
	@$(RUN) wheel

test:         ## install what is missing, then run all tests
	@$(RUN) test

style:        ## the style checks alone
	@$(RUN) style

unit:         ## Nova's unit tests that the series can affect, alone
	@$(RUN) unit

newer-python: ## the unit tests on the Python of the next Debian, compiled there
	@$(RUN) newer_python

sanitize:     ## the pump's tests under the compiler's sanitizers of memory, undefined behaviour and threads
	@$(RUN) sanitize

functional:   ## Nova's functional tests of the libvirt driver, and ours
	@$(RUN) functional

each:         ## test every commit of the series alone (ALL=1: all unit tests on each; FIRST=N LAST=M: from the Nth to the Mth)
	@$(RUN) each $(if $(ALL),--all) $(if $(FIRST),--first $(FIRST)) $(if $(LAST),--last $(LAST))

lab:          ## bring up two libvirt hosts and a cloud on this machine
	@lab/lab up

lab-down:     ## take the lab down; nothing stays
	@lab/lab down

lab-test:     ## run all of the lab's scenarios (LAB_SCENARIOS=fast: those of make test)
	@LAB_SCENARIOS=$${LAB_SCENARIOS:-all} $(RUN) lab

bench:        ## measure the pump against rsync, scp, virsh and nbdcopy
	@lab/bench

demo:         ## the whole story, live: legacy disk, pool, the other host
	@lab/demo
