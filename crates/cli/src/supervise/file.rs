//! What to keep alive, as people write it.

use super::liveness::Patience;
use crate::output::Failure;
use crate::yaml::{self, Bad, Node};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

/// One child.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Spec {
    /// What it is called in what is said of it.
    pub(crate) name: String,
    /// A program and its arguments; at least the program.
    pub(crate) command: Vec<String>,
    /// What its environment has beside the supervisor's.
    pub(crate) env: BTreeMap<String, String>,
    /// Where it answers if it is alive; without it, running is being alive.
    pub(crate) livez: Option<Livez>,
    /// What is borne from it.
    pub(crate) patience: Patience,
    /// Whether another like it can take its place while it runs.
    pub(crate) hands_over: bool,
}

/// Where to ask whether a child is alive.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Livez {
    /// The child's admin port.
    pub(crate) address: SocketAddr,
    /// Path and query.
    pub(crate) path: String,
}

/// The setting of leeward-proxy that makes it hand over, as a flag and in the environment.
const HANDOVER: (&str, &str) = ("--handover", "LEEWARD_HANDOVER");
/// Most children.
const MAX_CHILDREN: usize = 256;

impl Livez {
    /// Reads `http://IP:PORT/PATH`. No host names: a name that doesn't resolve says nothing about a child.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let bad = || "want http://IP:PORT/PATH, such as http://127.0.0.1:15020/livez".to_owned();
        let rest = text.strip_prefix("http://").ok_or_else(bad)?;
        let (address, path) = rest.split_once('/').ok_or_else(bad)?;
        // It stands in a request's first line.
        if path.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(bad());
        }
        Ok(Self {
            address: address.parse().map_err(|_| bad())?,
            path: format!("/{path}"),
        })
    }
}

impl Spec {
    /// A child that is given as a command, and is called what its program is called.
    pub(crate) fn of(command: Vec<String>, livez: Option<Livez>) -> Self {
        let name = command.first().map(Path::new).and_then(Path::file_name);
        let name = name.map_or_else(|| "child".to_owned(), |name| name.to_string_lossy().into_owned());
        Self {
            name,
            hands_over: hands_over(&command, &BTreeMap::new(), inherited()),
            command,
            env: BTreeMap::new(),
            livez,
            patience: Patience::DEFAULT,
        }
    }
}

fn inherited() -> bool {
    std::env::var_os(HANDOVER.1).is_some_and(|path| !path.is_empty())
}

/// Whether a command hands over: by its flags, its own environment or the supervisor's.
fn hands_over(command: &[String], env: &BTreeMap<String, String>, inherited: bool) -> bool {
    let (flag, variable) = HANDOVER;
    let by_flag = |arg: &String| {
        arg.strip_prefix(flag)
            .is_some_and(|r| r.is_empty() || r.starts_with('='))
    };
    let is_proxy = command
        .first()
        .map(Path::new)
        .and_then(Path::file_name)
        .is_some_and(|name| name == "leeward-proxy");
    command.iter().skip(1).any(by_flag)
        || env
            .get(variable)
            .map_or(inherited && is_proxy, |path| !path.is_empty())
}

/// Reads the children of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<Spec>, Failure> {
    yaml::read(path, |root| children(root, inherited()))
}

fn children(root: &Node<'_>, inherited: bool) -> Result<Vec<Spec>, Bad> {
    let [children] = root.fields(["children"])?;
    let children = children
        .ok_or_else(|| root.bad("want children, a list"))?
        .list()?;
    if children.is_empty() || children.len() > MAX_CHILDREN {
        return Err(root.bad(&format!(
            "want 1 to {MAX_CHILDREN} children, not {}",
            children.len()
        )));
    }
    let mut names = BTreeSet::new();
    let mut specs = Vec::new();
    for node in &children {
        let spec = child(node, inherited)?;
        if !names.insert(spec.name.clone()) {
            return Err(node.bad(&format!("a second child is called {}", spec.name)));
        }
        specs.push(spec);
    }
    Ok(specs)
}

fn child(node: &Node<'_>, inherited: bool) -> Result<Spec, Bad> {
    let [name, command, env, livez, liveness] =
        node.fields(["name", "command", "env", "livez", "liveness"])?;
    let command = command.ok_or_else(|| node.bad("want a command, a list of texts"))?;
    let words: Vec<String> = command.list()?.iter().map(Node::text).collect::<Result<_, _>>()?;
    if words.first().is_none_or(String::is_empty) {
        return Err(command.bad("want a program and its arguments"));
    }
    let mut spec = Spec::of(words, None);
    if let Some(name) = name {
        spec.name = name.text()?;
        if spec.name.is_empty() {
            return Err(name.bad("want a name"));
        }
    }
    if let Some(env) = env {
        for (variable, value) in env.map()? {
            spec.env.insert(variable, value.text()?);
        }
    }
    if let Some(livez) = livez {
        spec.livez = Some(Livez::parse(&livez.text()?).map_err(|why| livez.bad(&why))?);
    }
    if let Some(liveness) = liveness {
        if spec.livez.is_none() {
            return Err(liveness.bad("there is no livez that it could be about"));
        }
        let [grace, every, timeout, failures] = liveness.fields(["grace", "every", "timeout", "failures"])?;
        let or = |node: Option<Node<'_>>, default| node.map_or(Ok(default), |node| node.duration());
        spec.patience = Patience {
            grace: or(grace, Patience::DEFAULT.grace)?,
            every: or(every, Patience::DEFAULT.every)?,
            timeout: or(timeout, Patience::DEFAULT.timeout)?,
            failures: failures.map_or(Ok(Patience::DEFAULT.failures), |node| node.number(1, 100))?,
        };
        if spec.patience.every.is_zero() || spec.patience.timeout.is_zero() {
            return Err(liveness.bad("want every and timeout above 0"));
        }
    }
    spec.hands_over = hands_over(&spec.command, &spec.env, inherited);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn parse(text: &str, inherited: bool) -> Result<Vec<Spec>, Bad> {
        yaml::parse(text, |root| children(root, inherited))
    }

    #[test]
    fn a_file_is_read_as_it_is_written() {
        let text = "
children:
  - name: control
    command: [leeward-control, --data, /data, --listen, 127.0.0.1:15010]
    env: {LEEWARD_LOG: debug, N: 3}
  - command: [/usr/bin/leeward-proxy, --handover, /run/h.sock]
    livez: http://127.0.0.1:15020/livez
    liveness: {grace: 1s, every: 200ms, failures: 2}
";
        let specs = parse(text, false).unwrap();
        let [control, proxy] = specs.as_slice() else {
            panic!("{specs:?}")
        };
        assert_eq!((control.name.as_str(), control.command.len()), ("control", 5));
        assert_eq!(control.env["N"], "3");
        assert!(!control.hands_over && control.livez.is_none());
        assert_eq!(proxy.name, "leeward-proxy");
        assert!(proxy.hands_over);
        assert_eq!(proxy.livez.as_ref().unwrap().path, "/livez");
        let patience = Patience {
            grace: Duration::from_secs(1),
            every: Duration::from_millis(200),
            failures: 2,
            ..Patience::DEFAULT
        };
        assert_eq!(proxy.patience, patience);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, line, why) in [
            ("children: [", 2, "is not YAML"),
            ("childs: []", 1, "childs: is no field; want children"),
            ("children: []", 1, "want 1 to 256 children"),
            ("children: {a: b}", 1, "children: want a list"),
            ("children:\n  - {name: x}", 2, "children[0]: want a command"),
            (
                "children:\n  - {command: []}",
                2,
                "children[0].command: want a program",
            ),
            (
                "children:\n  - {command: [a, {b: c}]}",
                2,
                "children[0].command[1]: want a text",
            ),
            (
                "children:\n  - command: [a]\n    comand: b",
                3,
                "children[0].comand: is no field",
            ),
            (
                "children:\n  - command: [a]\n    livez: x",
                3,
                "children[0].livez: want http://IP:PORT/PATH",
            ),
            (
                "children:\n  - command: [a]\n    liveness: {}",
                3,
                "there is no livez",
            ),
            (
                "children:\n  - command: [a]\n    livez: http://127.0.0.1:1/\n    liveness: {every: 0s}",
                4,
                "want every and timeout above 0",
            ),
            (
                "children:\n  - command: [a]\n    livez: http://127.0.0.1:1/\n    liveness: {failures: 0}",
                4,
                "liveness.failures: want a whole number from 1 to 100",
            ),
            (
                "children:\n  - command: [a]\n  - command: [/b/a]",
                3,
                "a second child is called a",
            ),
        ] {
            let (at, said) = parse(text, false).unwrap_err();
            assert!(said.contains(why), "{text:?}: {said}");
            assert_eq!(at, line, "{text:?}: {said}");
        }
    }

    #[test]
    fn who_hands_over_is_seen_by_flag_and_environment() {
        let command = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let set = |value: &str| BTreeMap::from([("LEEWARD_HANDOVER".to_owned(), value.to_owned())]);
        let none = BTreeMap::new();
        assert!(hands_over(&command("leeward-proxy --handover /x"), &none, false));
        assert!(hands_over(&command("wrapper --handover=/x"), &none, false));
        assert!(!hands_over(
            &command("leeward-proxy --handover-timeout 3s"),
            &none,
            false
        ));
        assert!(hands_over(&command("leeward-proxy"), &set("/x"), false));
        assert!(hands_over(&command("leeward-proxy"), &none, true));
        assert!(!hands_over(&command("leeward-proxy"), &set(""), true));
        assert!(!hands_over(&command("leeward-control"), &none, true));
    }

    #[test]
    fn livez_is_an_address_and_a_path() {
        let livez = Livez::parse("http://[::1]:80/a?b=c").unwrap();
        assert_eq!((livez.address.port(), livez.path.as_str()), (80, "/a?b=c"));
        for bad in [
            "https://127.0.0.1:1/",
            "http://localhost:1/",
            "http://127.0.0.1:1",
            "http://127.0.0.1/",
            "http://127.0.0.1:1/a b",
            "127.0.0.1:1/livez",
        ] {
            assert!(Livez::parse(bad).is_err(), "{bad}");
        }
    }
}
