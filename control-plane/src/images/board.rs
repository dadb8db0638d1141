//! What is to be fetched when, and how it went. Time and chance are arguments.

use crate::policy::Image;
use leeward_module::hex;
use leeward_proto::v1;
use leeward_proto::v1::image_state::State as WireState;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

/// First pause after a failure; it doubles with each, with full jitter.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after a failure.
const MAX_PAUSE: Duration = Duration::from_secs(300);
/// How much of a reason is kept, in bytes.
const MAX_ERROR: usize = 1000;

/// Every image that policy names. Its size is that of policy.
#[derive(Debug, Default)]
pub(super) struct Board {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    image: Image,
    /// The Plugin's revision that was last looked at for, or that came of it.
    seen: u64,
    in_flight: bool,
    next: Option<Instant>,
    failures: u32,
    /// The digest of the manifest that `image.resolved` is of.
    manifest: Option<String>,
    state: State,
    since: SystemTime,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum State {
    Pending,
    Current,
    Failed(String),
}

/// How a fetch went well.
#[derive(Debug)]
pub(super) enum Landed {
    /// Nothing is new.
    Same,
    /// The Plugin has it now.
    Resolved {
        /// Its revision since.
        revision: u64,
        /// The module.
        sha256: [u8; 32],
        /// The manifest's digest.
        manifest: String,
    },
    /// The Plugin wants another one.
    Superseded,
}

impl Board {
    /// Follows policy. `draw` gives numbers from 0 to 1.
    pub(super) fn reconcile(
        &mut self,
        wanted: Vec<Image>,
        now: Instant,
        wall: SystemTime,
        mut draw: impl FnMut() -> f64,
    ) {
        let mut before = std::mem::take(&mut self.entries);
        for image in wanted {
            let place = image.place();
            let entry = match before.remove(&place) {
                Some(entry) => entry.follow(image, wall),
                None => Entry::new(image, now, wall, &mut draw),
            };
            self.entries.insert(place, entry);
        }
    }

    /// What is to be fetched now, at most so many; and of each the manifest that needs no fetching.
    pub(super) fn take_due(&mut self, now: Instant, most: usize) -> Vec<(Image, Option<String>)> {
        let due = self.entries.values_mut().filter(|entry| entry.is_due(now));
        due.take(most)
            .map(|entry| {
                entry.in_flight = true;
                entry.seen = entry.image.revision;
                entry.next = None;
                let manifest = entry.manifest.clone().filter(|_| entry.image.resolved.is_some());
                (entry.image.clone(), manifest)
            })
            .collect()
    }

    /// A fetch of an image has ended.
    pub(super) fn landed(
        &mut self,
        image: &Image,
        landed: Result<Landed, String>,
        now: Instant,
        wall: SystemTime,
        mut draw: impl FnMut() -> f64,
    ) {
        let Some(entry) = self.entries.get_mut(&image.place()) else {
            return;
        };
        entry.in_flight = false;
        if entry.image.image != image.image {
            return;
        }
        let refresh = entry.image.refresh;
        let again = refresh.map(|refresh| now + refresh.mul_f64(0.9 + 0.2 * draw().clamp(0.0, 1.0)));
        let state = match landed {
            Ok(Landed::Superseded) => return,
            Ok(Landed::Same) => State::Current,
            Ok(Landed::Resolved {
                revision,
                sha256,
                manifest,
            }) => {
                entry.seen = entry.seen.max(revision);
                entry.image.revision = entry.image.revision.max(revision);
                entry.image.resolved = Some(sha256);
                entry.manifest = Some(manifest);
                State::Current
            }
            Err(mut error) => {
                error.truncate(error.floor_char_boundary(MAX_ERROR));
                State::Failed(error)
            }
        };
        if matches!(state, State::Failed(_)) {
            entry.failures = entry.failures.saturating_add(1);
            entry.next = Some(now + pause(entry.failures, draw()));
        } else {
            entry.failures = 0;
            entry.next = again;
        }
        entry.say(state, wall);
    }

    /// When there is something to do next.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let idle = self.entries.values().filter(|entry| !entry.in_flight);
        idle.filter_map(|entry| entry.next).min()
    }

    /// How it stands with each, for people.
    pub(super) fn list(&self, now: Instant) -> Vec<v1::ImageState> {
        let entries = self.entries.iter();
        entries.map(|(place, entry)| entry.show(place, now)).collect()
    }
}

impl Entry {
    fn new(image: Image, now: Instant, wall: SystemTime, draw: &mut impl FnMut() -> f64) -> Self {
        let is_there = image.resolved.is_some();
        // After a start of the control plane: not all at once.
        let refresh = image.refresh.filter(|_| is_there);
        Self {
            seen: if is_there { image.revision } else { 0 },
            in_flight: false,
            next: refresh.map(|refresh| now + refresh.mul_f64(draw().clamp(0.0, 1.0))),
            failures: 0,
            manifest: None,
            state: if is_there { State::Current } else { State::Pending },
            since: wall,
            image,
        }
    }

    fn follow(mut self, image: Image, wall: SystemTime) -> Self {
        if image.image != self.image.image {
            self.manifest = None;
            self.failures = 0;
            self.next = None;
            self.say(State::Pending, wall);
        }
        self.image = image;
        self
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.in_flight && (self.image.revision > self.seen || self.next.is_some_and(|next| next <= now))
    }

    fn say(&mut self, state: State, wall: SystemTime) {
        if std::mem::discriminant(&self.state) != std::mem::discriminant(&state) {
            self.since = wall;
        }
        self.state = state;
    }

    fn show(&self, place: &str, now: Instant) -> v1::ImageState {
        let (state, error) = match &self.state {
            State::Pending => (WireState::Pending, ""),
            State::Current => (WireState::Current, ""),
            State::Failed(error) => (WireState::Failed, error.as_str()),
        };
        let next = self.next.map(|next| next.saturating_duration_since(now));
        v1::ImageState {
            field: place.to_owned(),
            image: self.image.image.to_string(),
            sha256: self.image.resolved.map(|digest| hex(&digest)).unwrap_or_default(),
            state: state.into(),
            error: error.to_owned(),
            since: Some(self.since.into()),
            next: next.and_then(|next| next.try_into().ok()),
        }
    }
}

/// Full jitter over an exponential bound, so that control planes and images that failed together don't come back so.
fn pause(failures: u32, draw: f64) -> Duration {
    let bound = FIRST_PAUSE
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(MAX_PAUSE);
    bound.mul_f64(draw.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::Name;

    const MINUTE: Duration = Duration::from_secs(60);

    fn image(tag: &str, revision: u64) -> Image {
        Image {
            plugin: Name::parse("p").unwrap(),
            field: "spec.source",
            revision,
            image: format!("r.example/p:{tag}").into(),
            refresh: None,
            insecure: false,
            sha256: None,
            resolved: None,
        }
    }

    struct Rig {
        board: Board,
        now: Instant,
        wall: SystemTime,
    }

    impl Rig {
        fn new() -> Self {
            Self {
                board: Board::default(),
                now: tokio::time::Instant::now().into_std(),
                wall: SystemTime::UNIX_EPOCH,
            }
        }

        fn wait(&mut self, time: Duration) {
            self.now += time;
            self.wall += time;
        }

        fn want(&mut self, image: &Image) {
            self.board
                .reconcile(vec![image.clone()], self.now, self.wall, || 0.5);
        }

        fn due(&mut self) -> Vec<(Image, Option<String>)> {
            self.board.take_due(self.now, 9)
        }

        fn landed(&mut self, image: &Image, landed: Result<Landed, &str>) {
            let landed = landed.map_err(str::to_owned);
            self.board.landed(image, landed, self.now, self.wall, || 0.5);
        }

        fn shown(&self) -> v1::ImageState {
            self.board.list(self.now).pop().unwrap()
        }
    }

    fn resolved(revision: u64) -> Landed {
        Landed::Resolved {
            revision,
            sha256: [7; 32],
            manifest: "sha256:m".into(),
        }
    }

    #[test]
    fn an_image_is_fetched_once_and_again_when_its_plugin_changes() {
        let mut rig = Rig::new();
        let mut image = image("1", 5);
        rig.want(&image);
        assert_eq!(rig.shown().state(), WireState::Pending);
        assert_eq!(rig.due(), [(image.clone(), None)]);
        assert!(rig.due().is_empty(), "it is in flight");
        // The write of what was fetched is seen before the flight has landed.
        let written = Image {
            revision: 6,
            resolved: Some([7; 32]),
            ..image.clone()
        };
        rig.want(&written);
        rig.landed(&image, Ok(resolved(6)));
        assert!(rig.due().is_empty());
        assert_eq!(
            (rig.shown().state(), rig.board.next_wake()),
            (WireState::Current, None)
        );
        image = Image {
            revision: 7,
            ..written
        };
        rig.want(&image);
        assert_eq!(rig.due(), [(image, Some("sha256:m".into()))]);
    }

    #[test]
    fn another_image_is_fetched_whatever_becomes_of_the_first() {
        let mut rig = Rig::new();
        let (first, second) = (image("1", 5), image("2", 6));
        rig.want(&first);
        assert_eq!(rig.due().len(), 1);
        rig.want(&second);
        assert!(rig.due().is_empty(), "one at a time for a place");
        rig.landed(&first, Err("gone"));
        assert_eq!(rig.shown().state(), WireState::Pending);
        assert_eq!(rig.due(), [(second.clone(), None)]);
        rig.landed(&second, Ok(Landed::Superseded));
        rig.board.reconcile(Vec::new(), rig.now, rig.wall, || 0.5);
        rig.landed(&second, Ok(resolved(9)));
        assert!(rig.board.list(rig.now).is_empty());
    }

    #[test]
    fn a_tag_is_looked_at_as_often_as_policy_says() {
        let mut rig = Rig::new();
        let image = Image {
            refresh: Some(MINUTE),
            ..image("1", 5)
        };
        rig.want(&image);
        rig.due();
        rig.landed(&image, Ok(resolved(6)));
        assert_eq!(rig.board.next_wake(), Some(rig.now + MINUTE));
        rig.wait(MINUTE);
        assert_eq!(rig.due()[0].1.as_deref(), Some("sha256:m"));
        rig.landed(&image, Ok(Landed::Same));
        assert_eq!(rig.board.next_wake(), Some(rig.now + MINUTE));
    }

    #[test]
    fn what_is_there_at_the_start_is_not_fetched_again_at_once() {
        let mut rig = Rig::new();
        let there = Image {
            resolved: Some([7; 32]),
            refresh: Some(MINUTE),
            ..image("1", 5)
        };
        rig.want(&there);
        assert!(rig.due().is_empty());
        assert_eq!(rig.board.next_wake(), Some(rig.now + MINUTE / 2));
    }

    #[test]
    fn failures_are_tried_again_ever_later_and_what_was_there_is_shown() {
        let mut rig = Rig::new();
        let image = Image {
            resolved: Some([7; 32]),
            ..image("1", 5)
        };
        rig.want(&image);
        let image = Image { revision: 6, ..image };
        rig.want(&image);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(rig.due().len(), 1);
            rig.landed(&image, Err(&"é".repeat(MAX_ERROR)));
            let next = rig.board.next_wake().unwrap();
            pauses.push(next - rig.now);
            rig.wait(next - rig.now);
        }
        assert_eq!(pauses[..3], [1, 2, 4].map(|n| FIRST_PAUSE * n / 2));
        assert_eq!(pauses[11], MAX_PAUSE / 2);
        let shown = rig.shown();
        assert_eq!((shown.state(), shown.error.len()), (WireState::Failed, MAX_ERROR));
        assert_eq!(shown.sha256, hex(&[7; 32]));
        assert_eq!(
            shown.since,
            Some(SystemTime::UNIX_EPOCH.into()),
            "since the first failure"
        );
        rig.due();
        rig.landed(&image, Ok(Landed::Same));
        let shown = rig.shown();
        assert_eq!((shown.state(), shown.error.as_str()), (WireState::Current, ""));
        assert_eq!(shown.since, Some(rig.wall.into()));
    }
}
