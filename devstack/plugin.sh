#!/bin/bash
# DevStack plugin: Nova with local disks in libvirt storage pools.
#
# DevStack sources this file at each of its phases, with the phase in $1 and $2.
# What isn't defined here (iniset, setup_develop, ...) is DevStack's.
# shellcheck disable=SC2154  # NOVA_DIR, NOVA_CPU_CONF, DATA_DIR, HOST_IP

LIBVIRT_STORAGE_DIR=$(readlink -f "$(dirname "${BASH_SOURCE[0]}")/..")
LIBVIRT_STORAGE_PKI=/etc/pki

# Apply the series to the checkout of Nova; once, however often one stacks.
function libvirt_storage_apply {
    local tree=$NOVA_DIR

    if [[ -e $tree/nova/virt/libvirt/storage/api.py ]]; then
        return
    fi
    (cd "$LIBVIRT_STORAGE_DIR" &&
        PYTHONPATH=tools python3 -m series tree &&
        PYTHONPATH=tools python3 -m series export)
    git -C "$tree" -c user.name=devstack -c user.email=devstack@localhost \
        am --quiet "$LIBVIRT_STORAGE_DIR"/dist/series/*.patch
    # Once more: the series has an extension that has to be compiled.
    setup_develop "$tree"
}

# Let libvirt listen with the certificate that DevStack has made for the host.
function libvirt_storage_listen {
    sudo install -d -m 755 "$LIBVIRT_STORAGE_PKI/CA" "$LIBVIRT_STORAGE_PKI/qemu" \
        "$LIBVIRT_STORAGE_PKI/libvirt/private"
    deploy_int_CA "$LIBVIRT_STORAGE_PKI/CA/cacert.pem"
    deploy_int_CA "$LIBVIRT_STORAGE_PKI/qemu/ca-cert.pem"
    local role
    for role in server client; do
        deploy_int_cert "$LIBVIRT_STORAGE_PKI/libvirt/${role}cert.pem" \
            "$LIBVIRT_STORAGE_PKI/libvirt/private/${role}key.pem"
        deploy_int_cert "$LIBVIRT_STORAGE_PKI/qemu/${role}-cert.pem" \
            "$LIBVIRT_STORAGE_PKI/qemu/${role}-key.pem"
    done
    # nova-compute is the client, QEMU opens its own files as its own user.
    sudo chgrp "$STACK_USER" "$LIBVIRT_STORAGE_PKI/libvirt/private" \
        "$LIBVIRT_STORAGE_PKI/libvirt/private/clientkey.pem"
    sudo chmod 750 "$LIBVIRT_STORAGE_PKI/libvirt/private"
    sudo chmod 640 "$LIBVIRT_STORAGE_PKI/libvirt/private/clientkey.pem"
    sudo chgrp kvm "$LIBVIRT_STORAGE_PKI"/qemu/*-key.pem
    sudo chmod 640 "$LIBVIRT_STORAGE_PKI"/qemu/*-key.pem

    sudo tee -a /etc/libvirt/libvirtd.conf >/dev/null <<LINES
tls_allowed_dn_list = [ $LIBVIRT_STORAGE_ALLOWED ]
LINES
    sudo tee -a /etc/libvirt/qemu.conf >/dev/null <<LINES
migrate_tls_x509_cert_dir = "$LIBVIRT_STORAGE_PKI/qemu"
migrate_tls_x509_verify = 1
LINES
    # The socket is systemd's, and is refused while the daemon runs.
    sudo systemctl stop libvirtd.service
    sudo systemctl enable --now libvirtd-tls.socket
    sudo systemctl start libvirtd.service
}

function libvirt_storage_configure {
    local conf=$NOVA_CPU_CONF

    iniset "$conf" libvirt images_type "$LIBVIRT_STORAGE_IMAGES_TYPE"
    iniset "$conf" libvirt live_migration_scheme tls
    iniset "$conf" libvirt live_migration_with_native_tls True
    iniset "$conf" libvirt live_migration_inbound_addr "$(hostname)"
    inidelete "$conf" libvirt live_migration_uri
}

if is_service_enabled n-cpu || is_service_enabled nova; then
    if [[ $1 == stack && $2 == install ]]; then
        echo_summary "Applying the series of libvirt storage pools to Nova"
        libvirt_storage_apply
    elif [[ $1 == stack && $2 == post-config ]] && is_service_enabled n-cpu; then
        echo_summary "Configuring libvirt storage pools"
        libvirt_storage_listen
        libvirt_storage_configure
    elif [[ $1 == stack && $2 == test-config ]] && is_service_enabled tempest; then
        iniset "$TEMPEST_CONFIG" compute-feature-enabled live_migration True
        iniset "$TEMPEST_CONFIG" compute-feature-enabled \
            block_migration_for_live_migration True
        iniset "$TEMPEST_CONFIG" compute-feature-enabled cold_migration True
        iniset "$TEMPEST_CONFIG" compute-feature-enabled resize True
    elif [[ $1 == clean ]]; then
        rm -rf "$LIBVIRT_STORAGE_DIR/dist" "$LIBVIRT_STORAGE_DIR/tree"
    fi
fi
