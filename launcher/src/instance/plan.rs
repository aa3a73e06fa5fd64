//! What the spawner is asked to make of an app.

use super::{End, Launch, Tag, fingerprint};
use crate::image::Layers;
use crate::outbound::Link;
use crate::sandbox::{NetworkPlan, Plan, VolumePlan};
use cmdb::units::Bytes;
use std::collections::BTreeMap;

/// Descriptors that an app may open; Debian's default for services.
const NOFILE: u64 = 8192;
/// `/dev/shm`, as Docker has it.
const SHM_BYTES: u64 = 64 << 20;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Launch {
    /// What another app's file says that the folder may hold.
    fn quota_of_others(&self, source: &str) -> Option<Bytes> {
        let apps = self.host.store.list();
        let volumes = apps.iter().flat_map(|(app, _)| &app.volumes);
        volumes.filter(|other| other.source == source).find_map(|other| other.quota)
    }

    /// The vhost file's word goes before the image's.
    pub(super) fn plan(&self, begun_us: u64, image: &Layers, link: Option<&Link>) -> Result<Plan, End> {
        let (container, own) = (&self.app.container, &image.config);
        let or = |given: &String, own: &String| if given.is_empty() { own.clone() } else { given.clone() };
        let argv = if container.command.is_empty() { own.command.clone() } else { container.command.clone() };
        if argv.first().is_none_or(String::is_empty) {
            return Err(self.failed(
                "could not be started: its image says no command; set container.command in the vhost file",
            ));
        }
        let port = container.port.or(own.port);
        let Some(id_base) = self.host.id_base(&self.app.name) else {
            return Err(self.failed("could not be started: no range of user ids is left on this host"));
        };
        let mut env: BTreeMap<String, String> = own.env.iter().cloned().collect();
        env.extend(container.env.clone());
        let mut default = |name: &str, value: String| {
            env.entry(name.to_owned()).or_insert(value);
        };
        default("PATH", DEFAULT_PATH.into());
        default("HOME", "/".into());
        default("HOSTNAME", self.app.name.to_string());
        if let Some(port) = port {
            default("PORT", port.to_string());
        }
        default("FC_APP", self.app.name.to_string());
        default("FC_GENERATION", self.generation.to_string());
        default("FC_WAKE_STARTED_NS", (begun_us * 1000).to_string());
        let volumes = self.app.volumes.iter();
        if !self.app.volumes.is_empty() && self.host.datapool.is_none() {
            return Err(self.failed("has volumes, but this host has no DataPool (see `up --datapool`)"));
        }
        let stop_signal = own.stop_signal();
        let tag = Tag {
            id_base,
            image: image.id.clone(),
            begun_us,
            runs: fingerprint(&self.app),
            stop_signal,
            link: link.map(|link| link.plan().clone()),
        };
        Ok(Plan {
            id: self.container(),
            note: serde_json::to_string(&tag).map_err(|e| self.cannot(&e))?,
            hostname: self.app.name.to_string(),
            argv,
            env: env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            workdir: or(&container.workdir, &own.workdir),
            user: or(&container.user, &own.user),
            port,
            id_base,
            upper_bytes: self.app.resources.disk.0,
            shm_bytes: SHM_BYTES,
            nofile: NOFILE,
            datapool: self.host.datapool.as_ref().map(|pool| pool.to_string_lossy().into_owned()),
            volumes: volumes
                .map(|v| VolumePlan {
                    source: v.source.clone(),
                    quota: v.quota.or_else(|| self.quota_of_others(&v.source)).map(|quota| quota.0),
                    target: v.target.clone(),
                    read_only: v.read_only,
                })
                .collect(),
            network: link.map(|link| NetworkPlan { resolv_conf: link.resolv_conf.clone() }),
            staging: self.host.staging.to_string_lossy().into_owned(),
            fault: self.host.faults.of(&self.container()),
        })
    }
}
