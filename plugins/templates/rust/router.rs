//! Gives a request the backend that it asks for, if that is healthy.

use leeward_plugin::{RequestHead, Router, Target};

struct Plugin;

impl Router for Plugin {
    fn choose(request: &RequestHead, targets: &[Target]) -> Option<usize> {
        let wanted = request.header("x-backend").into_iter().next()?;
        targets
            .iter()
            .position(|target| target.service.as_bytes() == wanted && target.healthy > 0)
    }
}

leeward_plugin::router!(Plugin);
