//! An authority that is replaced by another while both are trusted: the directory, step by step.
//!
//! `DIR` has what signs and `roots.pem`, the bundle; `DIR/next` what is to sign; `DIR/previous`, from the time when the next
//! one signs until its root is retired, what did. Each step is done whole or not at all, and found again by
//! [`Authorities::open`]. Whether it is time for one is not decided here.

use crate::authority::{Authority, AuthorityError};
use crate::bundle::{Bundle, BundleError};
use crate::files::install;
use std::path::{Path, PathBuf};

/// The authorities of a directory.
#[derive(Debug)]
pub struct Authorities {
    dir: PathBuf,
    current: Authority,
    previous: Option<Authority>,
    bundle: Bundle,
}

/// How far a rotation has got.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// None is under way.
    Steady,
    /// The next authority's root is in the bundle.
    Prepared,
    /// It signs, and the old root is still in the bundle.
    Active,
}

/// Why a step can't be taken.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// It is another one's turn.
    #[error("{step} can't be done now: {why}")]
    Order {
        /// The step.
        step: &'static str,
        /// What is to be done in its place.
        why: String,
    },
    /// An authority can't be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The roots can't be.
    #[error("the trust bundle: {0}")]
    Bundle(#[from] BundleError),
    /// The next authority is one of another mesh.
    #[error("the authority in {dir} is of the trust domain {got:?}; want {want:?}")]
    Domain {
        /// Its directory.
        dir: PathBuf,
        /// Its trust domain.
        got: String,
        /// The trust domain of now.
        want: String,
    },
    /// A file can't be read or written.
    #[error("can't change {dir}")]
    Files {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl Authorities {
    /// Opens a directory, and ends what was begun in it.
    ///
    /// # Errors
    ///
    /// If there is no authority in it, or one can't be used.
    pub fn open(dir: &Path) -> Result<Self, RotationError> {
        let current = Authority::open(dir)?;
        let mut previous = None;
        let old = dir.join("previous");
        if old.join("ca.pem").exists() {
            let authority = Authority::open(&old)?;
            if authority.fingerprint() == current.fingerprint() {
                // It was put aside, and its successor did not come to its place.
                remove(&old)?;
            } else {
                previous = Some(authority);
            }
        }
        let authorities = Self {
            dir: dir.into(),
            bundle: current.roots().clone(),
            current,
            previous,
        };
        match authorities.next() {
            // It has come to its place.
            Ok(Some(next)) if next.fingerprint() == authorities.current.fingerprint() => {
                remove(&authorities.next_dir())?;
            }
            Ok(_) => {}
            // What is to come later must not keep what is there from signing.
            Err(error) => {
                let dir = authorities.next_dir();
                tracing::warn!(dir = %dir.display(), %error, "the next authority can't be used");
            }
        }
        Ok(authorities)
    }

    /// What signs.
    pub fn current(&self) -> &Authority {
        &self.current
    }

    /// What signed before, while its root is trusted.
    pub fn previous(&self) -> Option<&Authority> {
        self.previous.as_ref()
    }

    /// The roots.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Where the next authority is to be put.
    pub fn next_dir(&self) -> PathBuf {
        self.dir.join("next")
    }

    /// How far a rotation has got.
    ///
    /// # Errors
    ///
    /// If the next authority can't be used.
    pub fn phase(&self) -> Result<Phase, RotationError> {
        if self.previous.is_some() {
            return Ok(Phase::Active);
        }
        let prepared = self.next()?.is_some_and(|next| self.bundle.has(next.root()));
        Ok(if prepared { Phase::Prepared } else { Phase::Steady })
    }

    /// Trusts more roots.
    ///
    /// # Errors
    ///
    /// If there are too many then, or the bundle can't be written.
    pub fn trust(&mut self, roots: &Bundle) -> Result<(), RotationError> {
        let bundle = self.bundle.with(roots)?;
        self.write_bundle(bundle)
    }

    /// Trusts the root of the authority in `next`, too.
    ///
    /// # Errors
    ///
    /// If there is none, or a rotation is under way that has gone further.
    pub fn prepare(&mut self) -> Result<(), RotationError> {
        let order = |why: String| RotationError::Order { step: "prepare", why };
        if self.phase()? == Phase::Active {
            return Err(order("a rotation is under way; retire the old root first".into()));
        }
        let dir = self.next_dir();
        let next = self.next()?.ok_or_else(|| {
            let (dir, domain) = (dir.display(), self.current.domain());
            order(format!(
                "there is no authority in {dir}; make one on this machine, such as with leeward ca init NEW-ROOT \
                 --trust-domain {domain} and leeward ca intermediate --root NEW-ROOT --out {dir}"
            ))
        })?;
        if next.domain() != self.current.domain() {
            return Err(RotationError::Domain {
                dir,
                got: next.domain().to_owned(),
                want: self.current.domain().to_owned(),
            });
        }
        let bundle = self.bundle.with(next.roots())?;
        self.write_bundle(bundle)
    }

    /// Takes back [`Self::prepare`]: what is in `next` goes, and its root with it.
    ///
    /// # Errors
    ///
    /// If nothing is prepared.
    pub fn cancel(&mut self) -> Result<(), RotationError> {
        let next = match (self.phase()?, self.next()?) {
            (Phase::Prepared, Some(next)) => next,
            (Phase::Active, _) => {
                let why = "the new authority signs already; rotate back, with one of the old root in next/";
                return Err(RotationError::Order {
                    step: "cancel",
                    why: why.to_owned(),
                });
            }
            (Phase::Prepared | Phase::Steady, _) => {
                return Err(RotationError::Order {
                    step: "cancel",
                    why: "nothing is prepared".to_owned(),
                });
            }
        };
        let signs = self.current.root().to_owned();
        let bundle = self
            .bundle
            .filtered(|root| root.fingerprint == signs || root.fingerprint != next.root())?;
        self.write_bundle(bundle)?;
        remove(&self.next_dir())
    }

    /// Lets the authority in `next` sign.
    ///
    /// # Errors
    ///
    /// If it isn't prepared.
    pub fn activate(&mut self) -> Result<(), RotationError> {
        let order = |why: &str| RotationError::Order {
            step: "activate",
            why: why.to_owned(),
        };
        match self.phase()? {
            Phase::Prepared => {}
            Phase::Steady => return Err(order("nothing is prepared; prepare first")),
            Phase::Active => return Err(order("the new authority signs already; retire comes next")),
        }
        let roots = self.bundle.to_pem();
        self.put(&self.dir, &self.dir.join("previous"), &roots)?;
        self.put(&self.next_dir(), &self.dir, &roots)?;
        *self = Self::open(&self.dir)?;
        Ok(())
    }

    /// Trusts only the root that what signs leads to.
    ///
    /// # Errors
    ///
    /// If there is nothing to retire, or something else is prepared.
    pub fn retire(&mut self) -> Result<(), RotationError> {
        let order = |why: &str| RotationError::Order {
            step: "retire",
            why: why.to_owned(),
        };
        match self.phase()? {
            Phase::Prepared => return Err(order("a new authority is prepared; activate or cancel it first")),
            Phase::Steady if self.bundle.roots().len() == 1 => {
                return Err(order("there is one root, and it signs"));
            }
            Phase::Steady | Phase::Active => {}
        }
        let signs = self.current.root().to_owned();
        let bundle = self.bundle.filtered(|root| root.fingerprint == signs)?;
        self.write_bundle(bundle)?;
        remove(&self.dir.join("previous"))?;
        self.previous = None;
        Ok(())
    }

    fn next(&self) -> Result<Option<Authority>, RotationError> {
        let dir = self.next_dir();
        if !dir.join("ca.pem").exists() {
            return Ok(None);
        }
        Ok(Some(Authority::open(&dir)?))
    }

    fn write_bundle(&mut self, bundle: Bundle) -> Result<(), RotationError> {
        let pem = bundle.to_pem();
        install(&self.dir, &[("roots.pem", pem.as_bytes(), 0o644)])
            .map_err(|source| failed(&self.dir, source))?;
        self.bundle = bundle;
        Ok(())
    }

    /// Copies an authority to another directory, with these roots.
    fn put(&self, from: &Path, to: &Path, roots: &str) -> Result<(), RotationError> {
        let read = |name: &str| std::fs::read(from.join(name)).map_err(|source| failed(from, source));
        let (key, cert) = (read("ca-key.pem")?, read("ca.pem")?);
        let files = [
            ("roots.pem", roots.as_bytes(), 0o644),
            ("ca-key.pem", key.as_slice(), 0o600),
            ("ca.pem", cert.as_slice(), 0o644),
        ];
        install(to, &files).map_err(|source| failed(to, source))
    }
}

fn failed(dir: &Path, source: std::io::Error) -> RotationError {
    let dir = dir.into();
    RotationError::Files { dir, source }
}

fn remove(dir: &Path) -> Result<(), RotationError> {
    match std::fs::remove_dir_all(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(failed(dir, source)),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// A root and an intermediate of it in `ca`, and another root and an intermediate in `ca/next`.
    fn two(scratch: &Scratch) -> Authorities {
        let dir = scratch.dir("ca");
        let old = Authority::create(&scratch.dir("old"), "td").unwrap();
        old.intermediate(DAY, &dir).unwrap();
        let authorities = Authorities::open(&dir).unwrap();
        let new = Authority::create(&scratch.dir("new"), "td").unwrap();
        new.intermediate(DAY, &authorities.next_dir()).unwrap();
        authorities
    }

    fn reopened(scratch: &Scratch) -> Authorities {
        Authorities::open(&scratch.dir("ca")).unwrap()
    }

    #[test]
    fn a_root_is_replaced_with_both_trusted_in_between() {
        let scratch = Scratch::new();
        let mut authorities = two(&scratch);
        let (old, steady) = (authorities.current().root().to_owned(), Phase::Steady);
        assert_eq!(
            (authorities.phase().unwrap(), authorities.bundle().roots().len()),
            (steady, 1)
        );
        assert!(matches!(authorities.activate(), Err(RotationError::Order { .. })));
        assert!(matches!(authorities.retire(), Err(RotationError::Order { .. })));
        assert!(matches!(authorities.cancel(), Err(RotationError::Order { .. })));

        authorities.prepare().unwrap();
        let mut authorities = reopened(&scratch);
        assert_eq!(
            (authorities.phase().unwrap(), authorities.bundle().roots().len()),
            (Phase::Prepared, 2)
        );
        assert_eq!(authorities.current().root(), old);
        assert!(matches!(authorities.retire(), Err(RotationError::Order { .. })));

        authorities.activate().unwrap();
        for mut authorities in [authorities, reopened(&scratch)] {
            assert_eq!(
                (authorities.phase().unwrap(), authorities.bundle().roots().len()),
                (Phase::Active, 2)
            );
            assert_ne!(authorities.current().root(), old);
            assert_eq!(authorities.previous().unwrap().root(), old);
            assert!(matches!(authorities.prepare(), Err(RotationError::Order { .. })));
            assert!(matches!(authorities.cancel(), Err(RotationError::Order { .. })));
        }

        let mut authorities = reopened(&scratch);
        authorities.retire().unwrap();
        for authorities in [authorities, reopened(&scratch)] {
            assert_eq!(
                (authorities.phase().unwrap(), authorities.bundle().roots().len()),
                (steady, 1)
            );
            assert!(!authorities.bundle().has(&old) && authorities.previous().is_none());
        }
    }

    #[test]
    fn what_is_prepared_can_be_taken_back() {
        let scratch = Scratch::new();
        let mut authorities = two(&scratch);
        let before = authorities.bundle().clone();
        authorities.prepare().unwrap();
        authorities.cancel().unwrap();
        assert_eq!(
            (authorities.bundle(), authorities.phase().unwrap()),
            (&before, Phase::Steady)
        );
        let error = authorities.prepare().unwrap_err().to_string();
        assert!(
            error.contains("leeward ca intermediate --root NEW-ROOT --out"),
            "{error}"
        );
    }

    #[test]
    fn an_intermediate_is_replaced_by_another_of_the_same_root() {
        let scratch = Scratch::new();
        let old = Authority::create(&scratch.dir("root"), "td").unwrap();
        old.intermediate(DAY, &scratch.dir("ca")).unwrap();
        let mut authorities = reopened(&scratch);
        let first = authorities.current().fingerprint().to_owned();
        old.intermediate(DAY, &authorities.next_dir()).unwrap();
        authorities.prepare().unwrap();
        authorities.activate().unwrap();
        assert_ne!(authorities.current().fingerprint(), first);
        authorities.retire().unwrap();
        assert_eq!(
            (authorities.phase().unwrap(), authorities.current().root()),
            (Phase::Steady, old.fingerprint())
        );
    }

    #[test]
    fn whatever_is_cut_short_is_found_as_it_was_or_done() {
        let scratch = Scratch::new();
        let mut authorities = two(&scratch);
        authorities.prepare().unwrap();
        let roots = authorities.bundle().to_pem();
        // The old one is put aside, and nothing more.
        authorities
            .put(&scratch.dir("ca"), &scratch.dir("ca").join("previous"), &roots)
            .unwrap();
        let mut authorities = reopened(&scratch);
        assert_eq!(authorities.phase().unwrap(), Phase::Prepared);
        // The new one is in its place, and still in `next`, too.
        authorities
            .put(&scratch.dir("ca"), &scratch.dir("ca").join("previous"), &roots)
            .unwrap();
        authorities
            .put(&authorities.next_dir(), &scratch.dir("ca"), &roots)
            .unwrap();
        authorities = reopened(&scratch);
        assert_eq!(authorities.phase().unwrap(), Phase::Active);
        assert!(!authorities.next_dir().exists());
    }

    #[test]
    fn an_authority_of_another_mesh_is_not_prepared() {
        let scratch = Scratch::new();
        Authority::create(&scratch.dir("ca"), "td").unwrap();
        let mut authorities = reopened(&scratch);
        Authority::create(&authorities.next_dir(), "elsewhere").unwrap();
        assert!(matches!(authorities.prepare(), Err(RotationError::Domain { .. })));
    }
}
