//! Where a request comes in.

use super::{BadQuestion, Step, Telling, bad};
use crate::lint::text::list;
use crate::model::GatewayProtocol;
use crate::{Kind, ListenerView};

/// How a request fares at the door.
pub(super) enum Came<'a> {
    /// It is in: by this listener, or from a workload of the mesh.
    In(Option<&'a ListenerView>),
    /// It is answered there.
    Answered(String),
}

impl<'a> Telling<'a> {
    pub(super) fn door(&mut self) -> Result<Came<'a>, BadQuestion> {
        let viewer = &self.snapshot.viewer;
        let proxy = format!("{} of zone {}", viewer.proxy, viewer.zone);
        let Some((gateway, section)) = &self.asked.question.gateway else {
            let says = format!("comes from a workload to the outbound listener of proxy {proxy}");
            self.steps.push(Step::new("listener", says).fact("from", "mesh"));
            return Ok(Came::In(None));
        };
        self.involve(Kind::Gateway, gateway.as_str());
        let ports = self.snapshot.ports();
        let all = ports.iter().flat_map(|port| &port.listeners);
        let of: Vec<&'a ListenerView> = all
            .filter(|listener| *listener.gateway == *gateway.as_str())
            .collect();
        if of.is_empty() {
            return Err(bad(
                "gateway",
                format!(
                    "proxy {proxy} has no listeners of Gateway/{gateway}; ask one that has, in one of its zones"
                ),
            ));
        }
        let named =
            |listener: &&&ListenerView| section.as_ref().is_none_or(|name| *name == listener.spec.name);
        // A client comes to a port, and there to the listener whose hostname fits best.
        let first = of.iter().find(|listener| named(listener) && self.fits(listener));
        let Some(first) = first.or_else(|| of.iter().find(named)).copied() else {
            let known = list(of.iter().map(|listener| &listener.spec.name));
            let name = section.as_ref().map_or("", |name| name.as_str());
            return Err(bad(
                "gateway",
                format!("{name:?} is not a listener of Gateway/{gateway}; want one of {known}"),
            ));
        };
        let port = self.snapshot.port(first.spec.address);
        let host = self.asked.host();
        let Some(listener) = port.and_then(|port| port.listener(host)) else {
            let hosts = port
                .into_iter()
                .flat_map(|port| &port.listeners)
                .map(|listener| &listener.spec.hostname);
            let says = format!(
                "no listener at {} is for {host}; they are for {}",
                first.spec.address,
                list(hosts)
            );
            self.steps.push(Step::new("listener", says.clone()));
            return Ok(Came::Answered(format!("{} gets 404: {says}", self.asked.told())));
        };
        let step = Step::new(
            "listener",
            format!(
                "comes to {} of proxy {proxy} at {}",
                listener.id, listener.spec.address
            ),
        )
        .fact("from", "gateway")
        .fact("listener", &listener.id)
        .fact("address", listener.spec.address)
        .fact("hostname", &listener.spec.hostname);
        let step = match super::key(Kind::Gateway, &listener.gateway) {
            Some(key) => step.by(key, format!("spec.listeners[{}]", listener.position)),
            None => step,
        };
        self.steps.push(step);
        if let GatewayProtocol::Http { redirect: Some(to) } = &listener.spec.protocol {
            let says = format!("answered with {} to https, port {}", to.status, to.port);
            self.steps.push(Step::new("redirect", says.clone()));
            return Ok(Came::Answered(format!("{} is {says}", self.asked.told())));
        }
        Ok(Came::In(Some(listener)))
    }

    fn fits(&self, listener: &ListenerView) -> bool {
        listener.spec.hostname.fit(self.asked.host()).is_some()
    }
}
